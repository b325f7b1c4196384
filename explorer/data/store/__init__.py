"""Data of the store pages: its snapshots and their changes, channels, copies, broken images."""
