"""Tests of serving have a cache of their own."""

from tests.shared import own_cache

__all__ = ["own_cache"]
