"""Data files: rows of features as Parquet, the merged files of a shard, and the precision of dtypes."""
