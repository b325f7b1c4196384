"""Keys to their owners, vectors back, gradients home."""
