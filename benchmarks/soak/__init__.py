"""Soaks: a server under a bounded load for a long time."""
