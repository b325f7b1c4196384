"""Check whether a run may use a store that is not the one it was trained on: python -m trainer.compat."""

SAMPLE = 10_000
"""Features that are compared, and test impressions that are scored."""
MAX_LOGLOSS_CHANGE = 0.001
"""So much may the log loss change, in parts of itself."""
