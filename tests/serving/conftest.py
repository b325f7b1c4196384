"""Tests of serving have a cache of their own."""

from tests.running.shared import own_cache

__all__ = ["own_cache"]
