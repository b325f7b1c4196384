"""IDs of texts and of crossed columns, the dictionary that leads back, and the sharded tables of their rows."""
