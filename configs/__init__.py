"""Presets: each file has `get_config() -> Config`, and its docstring is the command to run."""
