"""Data files: rows of features as Parquet, one shard's files read as one, and what a dtype keeps of a number."""
