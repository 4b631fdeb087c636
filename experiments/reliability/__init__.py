"""Fault injection: kills at random moments, each resumed to the same bits."""
