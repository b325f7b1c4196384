"""The base nets: what becomes of the vectors of one sample."""
