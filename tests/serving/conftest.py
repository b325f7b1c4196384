"""Tests of serving have a cache of their own, and share published models."""

from tests.running.shared import own_cache
from tests.serving.bundle.conftest import bundle_places, exported

__all__ = ["bundle_places", "exported", "own_cache"]
