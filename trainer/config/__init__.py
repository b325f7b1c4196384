"""The configuration of a run: its settings, where they come from, and how they are checked."""
