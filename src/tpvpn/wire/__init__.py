"""Formats: bytes to values and back, nothing else."""
