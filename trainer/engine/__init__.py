"""One training step, and all that it is put together from."""
