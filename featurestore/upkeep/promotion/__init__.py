"""Channels of a store, moved by hand or by gates: what has to hold before `stable` points to a new snapshot."""
