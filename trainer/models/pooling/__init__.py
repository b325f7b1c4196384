"""Poolings: many behaviour vectors of a sample become one."""
