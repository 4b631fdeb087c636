"""Complete training programs, one per library: `python -m examples.linen`."""
