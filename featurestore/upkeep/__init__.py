"""Upkeep of a store over the years: its history, its size, its checks and repairs, its dtype."""

DATA = "data"  # folder of the data files
KEEP_LAST, KEEP_DAYS, GRACE_DAYS = 10, 30.0, 7.0
"""What an expiry keeps: of the last snapshots, of the days whose every state stays, and of the days after that."""

MIN_COVERAGE, MAX_QUARANTINE, MAX_DRIFT, MIN_NEIGHBOURS, MAX_GAUC_LOSS = 0.99, 0.01, 0.25, 0.9, 0.001
"""Limits of the gates where nobody names others; here, as a command's help shows them, and loads nothing for that."""
