"""Tests of serving have a cache of their own, and share published models."""

from tests.running.shared import own_cache
from tests.serving.bundle.conftest import exported

__all__ = ["exported", "own_cache"]
