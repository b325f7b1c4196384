"""From sample groups in Parquet to one rank's batches of numpy arrays."""
