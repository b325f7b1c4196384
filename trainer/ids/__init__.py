"""ID tables: rows of numbers for ids, cut into shards, each shard on the rank that owns it."""
