"""Versions over time: whether one is sound, and the removal of old ones."""

KEEP_LAST, KEEP_DAYS, GRACE_DAYS = 5, 30.0, 1.0
"""What an expiry keeps: of the last versions, of the days since one was published, and since one was in use."""
