"""What the TPU compiler counts; no TPU is needed."""
