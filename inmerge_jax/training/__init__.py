"""Training: configuration, step, loop, checkpoints, and the files of a run."""
