"""Upkeep of a store over the years: its history, its size, its checks and repairs, its dtype."""

DATA, DAMAGED = "data", "damaged"
"""Folders: of the data files, and of what a repair found damaged."""
KEEP_LAST, KEEP_DAYS, GRACE_DAYS = 10, 30.0, 7.0
"""What an expiry keeps: of the last snapshots, of the days whose every state stays, and of the days after that."""
