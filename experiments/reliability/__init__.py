"""Fault injection, long runs, and scaling over devices and processes."""
