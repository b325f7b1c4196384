"""Versions over time: whether one is sound, and the removal of old ones."""
