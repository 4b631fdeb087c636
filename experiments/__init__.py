"""The experiments: one module per question, each runnable with `python -m experiments.NAME`."""
