"""Ahead-of-time compilation of the train step, and the analysis of the compiled program."""
