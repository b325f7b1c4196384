"""Tests of serving have a cache of their own, and share published models."""

from functools import cache

import pytest

from tests.running.shared import own_cache
from tests.serving.bundle.conftest import exported
from tests.serving.scoring.variants import Variants, shared_places
from tests.serving.scoring.variants import exported as exported_variant

__all__ = ["exported", "own_cache"]


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Variants:
    """Gives a variant with its network by its name; tests only read it."""
    places = shared_places(tmp_path_factory)
    return cache(lambda name: exported_variant(places, name))
