"""Channels of a store, moved by hand or by gates: what has to hold before `stable` points to a new snapshot."""

MIN_COVERAGE, MAX_QUARANTINE, MAX_DRIFT, MIN_NEIGHBOURS, MAX_GAUC_LOSS = 0.99, 0.01, 0.25, 0.9, 0.001
"""Limits of the gates where nobody names others; here, as a command's help shows them, and loads nothing for that."""
