"""The variants of variants.py, each trained and exported when a test first asks for it."""

from collections.abc import Callable
from functools import cache

import pytest

from tests.serving.scoring.variants import Exported, exported, shared_places


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Gives a variant by its name; tests only read it."""
    places = shared_places(tmp_path_factory)
    return cache(lambda name: exported(places, name))
