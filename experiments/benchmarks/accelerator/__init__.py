"""Checks and measures the project on an accelerator: `python -m experiments.accelerator`."""
