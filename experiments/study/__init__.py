"""What the experiments about merging share: trials of a grid, their training, their statistics."""
