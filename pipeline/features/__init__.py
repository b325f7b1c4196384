"""Extraction of features into a store: of new images, and of changed ones."""
