"""Meshes, placement and communication of any model: collectives, experts, sequences, stages."""

GRAMMAR = "comma-separated pp, dp and ep with a size, such as dp4,ep8 or dp*,ep2x4"  # of --mesh
