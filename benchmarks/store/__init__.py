"""How fast the store serves and takes features, compared with what else one could use: python -m benchmarks.store."""
