"""Readers of sample groups in Parquet, as one rank's batches of numpy arrays."""
