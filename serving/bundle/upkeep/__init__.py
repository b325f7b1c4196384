"""Maintenance of a bundle: verification of versions, and removal of old ones."""

KEEP_LAST, KEEP_DAYS, GRACE_DAYS = 5, 30.0, 1.0
"""Defaults of an expiry: number of versions kept, days since publication or use, and days since use alone."""
