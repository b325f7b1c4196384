"""Stores that are made of another one: in another dtype, or of fewer numbers."""
