"""IDs of texts and of crossed columns, the dictionary from IDs to texts, and the sharded tables of their rows."""
