"""A package folder for a TFDS builder, which needs one."""
