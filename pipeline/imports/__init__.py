"""Vectors of another network or modality, computed elsewhere, into a feature store of their own."""
