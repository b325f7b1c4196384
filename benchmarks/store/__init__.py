"""How fast the store serves and takes features, beside what else one could use: python -m benchmarks.store."""
