"""Compact features beside the full width."""
