"""What the experiments about merging share: cells of a grid, their training, their statistics."""
