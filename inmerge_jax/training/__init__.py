"""Training: steps, the loop, and the evidence that a run leaves behind."""
