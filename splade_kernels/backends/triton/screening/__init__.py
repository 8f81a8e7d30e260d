"""Exact screening on Triton: int8 rows, their bounds, and exact dots of what survives."""
