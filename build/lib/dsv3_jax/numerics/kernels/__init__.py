"""Kernels: one hardware, one operation a file."""
