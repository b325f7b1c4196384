"""Training over ranks that are workers and servers at once."""
