"""Compact features compared with the full width."""
