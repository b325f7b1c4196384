"""The variants of variants.py, each trained and exported when a test first asks for it."""

from collections.abc import Callable
from functools import cache

import pytest

from tests.serving.scoring.variants import Exported, exported, placed


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Gives a variant by its name; tests only read it."""
    places = placed(tmp_path_factory.mktemp("variants"))
    return cache(lambda name: exported(places, name))
