"""The configuration of a run: its settings, their sources and their checks."""
