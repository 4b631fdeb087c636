"""Figures of the documentation that need a training of seconds."""
