"""Measurements: merge cost, training steps, accelerators, the TPU compiler."""
