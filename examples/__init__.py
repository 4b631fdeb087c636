"""Complete training programs, run from the repository root: `python -m examples.linen`."""
