"""In-model merging for any JAX training loop."""
