"""Benchmark of the explorer: its pages on a large store, and small pictures under load."""
