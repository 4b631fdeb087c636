"""The command line `inmerge`, one module per command."""
