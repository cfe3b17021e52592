"""Text to batches of rows, with nothing but files of this machine."""
