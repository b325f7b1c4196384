"""A shard of several files read as one: which keys live, and the uris of some of them."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from featurestore import FeatureStore, StoreInfo, to_bits
from featurestore.errors import KeyCollisionError
from featurestore.format.rows import FeatureRows
from featurestore.format.shard import ShardReader
from featurestore.keys import shard_of
from tests.faulty import faulty

KEYS = np.arange(40)


@pytest.fixture
def reader(store: FeatureStore, info: StoreInfo) -> ShardReader:
    """The first shard: keys 0 to 39 of it, of which 10 to 14 went, and 12 came back."""

    def put(keys: np.ndarray) -> None:
        features = to_bits(np.ones((len(keys), info.dim), np.float32), info.dtype)
        store.put(FeatureRows.of([f"{key}.jpg" for key in keys], features, keys=keys))

    put(KEYS)
    store.delete(np.arange(10, 15))
    put(np.array([12]))
    return store.snapshot().shard_reader(0)


def test_uris_of_some_keys(reader: ShardReader, info: StoreInfo) -> None:
    here = KEYS[shard_of(KEYS, info.num_shards) == 0]
    live = np.array([key for key in here.tolist() if key not in (10, 11, 13, 14)])
    np.testing.assert_array_equal(np.sort(reader.keys()), live)
    asked = np.array([live[-1], 10, 10_000, live[0], live[-1]])
    keys, uris = reader.uris(asked)
    assert keys.tolist() == [live[-1], live[0], live[-1]]
    assert uris == [f"{key}.jpg" for key in keys]
    np.testing.assert_array_equal(reader.contains(asked), [True, False, False, True, True])
    assert reader.uris(np.array([10_000]))[1] == []
    assert not reader.contains(np.empty(0, np.int64)).any()


def test_another_uri_under_a_key_is_refused(reader: ShardReader) -> None:
    key = reader.keys()[:1]
    reader.check_uris(key, [f"{key[0]}.jpg"])
    with pytest.raises(KeyCollisionError, match="other"):
        reader.check_uris(key, ["other.jpg"])


def test_a_shard_without_files_has_no_key(store: FeatureStore, info: StoreInfo) -> None:
    empty = store.snapshot().shard_reader(0)
    assert not empty.contains(KEYS).any()
    assert empty.uris(KEYS)[1] == []


def test_threads_read_shards_at_the_same_time(store: FeatureStore, make_rows) -> None:
    """Two readings wait for each other inside the storage: they end if none waits for the other's end."""
    store.put(make_rows(100, store.info))
    store.put(make_rows(100, store.info, seed=1))
    both = threading.Barrier(2)

    def meet(read: Callable[[str], bytes], path: str) -> bytes:
        if path.startswith("data/") and threading.get_ident() not in met:
            met.add(threading.get_ident())
            both.wait(60)
        return read(path)

    met: set[int] = set()
    snapshot = faulty(store, read_bytes=meet).snapshot()
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda shard: snapshot.shard_reader(shard).keys(), range(2)))
    assert len(met) == 2
