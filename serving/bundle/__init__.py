"""Bundles: a trained run as immutable, numbered versions on a disk or object store, and which one is in use."""

MODELS = "data/models/ctr"
"""Default address of a published model."""
SAMPLE_GROUPS = 64
"""Groups of test samples in a bundle."""
KEEP_LAST, KEEP_DAYS, GRACE_DAYS = 5, 30.0, 1.0
"""Defaults of an expiry: number of versions kept, days since publication or use, and days since use alone."""
