"""Maintenance of a store: its history, its size, its checks and repairs, its dtype."""

DATA, DAMAGED = "data", "damaged"
"""Folders of the data files, and of damaged files that a repair has replaced."""
KEEP_LAST, KEEP_DAYS, GRACE_DAYS = 10, 30.0, 7.0
"""Defaults of an expiry: number of last snapshots, days with all snapshots, and days with one snapshot a day."""
