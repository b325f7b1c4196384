"""Semantic IDs: codes of a residual quantiser for every image, as ID fields of the samples."""
