"""Takedowns: images that have to leave a store with all of its history, and the proof that they have."""
