"""A store whose rows have three ages."""

import pytest

from featurestore import FeatureStore


@pytest.fixture
def filled(filled_by, make_rows) -> FeatureStore:
    """400 images; of 200 of them newer rows, of 20 of those tombstones."""

    def fill(store: FeatureStore) -> None:
        store.put(make_rows(400, store.info, seed=0))
        store.put(make_rows(200, store.info, seed=1))
        store.delete(make_rows(20, store.info).keys_N)

    return filled_by(fill)


@pytest.fixture
def nine(filled_by, make_rows) -> FeatureStore:
    """Versions 1 to 9 of one row."""

    def nine_puts(store: FeatureStore) -> None:
        for version in range(1, 10):
            store.put(make_rows(1, store.info, seed=version))

    return filled_by(nine_puts)
