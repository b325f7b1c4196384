"""The bits that come over the wire are those of a partition: every dtype, any keys."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from featurestore import FeatureClient, FeaturePartition, FeatureRows, FeatureStore, StoreInfo, connect, keys_of_uris
from featurestore.errors import MissingKeysError, SnapshotNotFoundError
from featurestore.flight.client import _keys
from featurestore.upkeep.expiry import expire
from tests.featurestore.conftest import make_rows
from tests.featurestore.flight.conftest import Serve, lookup_once_up

ROWS = 3_000


def make_store(folder: Path, info: StoreInfo, rows: int = ROWS) -> FeatureStore:
    """A store of drawn rows, some of which were replaced and removed since."""
    rng = np.random.default_rng(5)
    store = FeatureStore.create(folder, info)
    for first in (0, rows // 3):
        names = [f"images/{i}.jpg" for i in range(first, rows)]
        store.put(FeatureRows.of(names, rng.standard_normal((len(names), info.dim)).astype(np.float32)))
    store.delete(keys_of_uris([f"images/{i}.jpg" for i in range(0, rows, 7)]))
    return store


def any_keys(rows: int = ROWS) -> np.ndarray:
    """Keys that are there, twice, removed ones, and strange ones, shuffled."""
    known = keys_of_uris([f"images/{i}.jpg" for i in range(rows)])
    strange = np.array([0, -1, np.iinfo(np.int64).min, np.iinfo(np.int64).max])
    return np.random.default_rng(1).permutation(np.concatenate([known, known[::3], strange]))


def assert_same(client: FeatureClient, store: FeatureStore, folder: Path, keys_U: np.ndarray) -> None:
    """Client and partition give the same bits, the same mask and the same properties."""
    with FeaturePartition.load(store, cache_dir=folder / "cache", missing="zeros") as partition:
        expected, found = partition.lookup(keys_U), client.lookup(keys_U)
        assert found.features_UD.dtype == expected.features_UD.dtype
        assert found.features_UD.tobytes() == expected.features_UD.tobytes()
        np.testing.assert_array_equal(found.missing_U, expected.missing_U)
        np.testing.assert_array_equal(client.contains(keys_U), partition.contains(keys_U))
        for name in ("dim", "num_rows", "snapshot_version", "snapshot_id", "info", "missing_count"):
            assert getattr(client, name) == getattr(partition, name), name
        values_ND = partition.codec.decode(expected.features_UD)
        np.testing.assert_array_equal(client.codec.decode(found.features_UD), values_ND)


@pytest.mark.parametrize("keys", [[1.5], [2.0**60], ["shoe/1.jpg"]])
def test_keys_that_are_no_whole_numbers_are_refused(keys: list[object]) -> None:
    with pytest.raises(TypeError, match=r"and have to be int64: featurestore\.keys_of_uris"):
        _keys(keys)  # type: ignore[arg-type]
    assert (_keys([]).shape, _keys(7).shape) == ((0,), (1,))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_bits_of_a_partition(dtype: str, info: StoreInfo, serve: Serve, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", info.model_copy(update={"dtype": dtype, "dim": 12}))
    server = serve(store)
    with connect(server.address, missing="zeros") as client:
        assert_same(client, store, tmp_path, any_keys())


@pytest.mark.long
def test_few_keys_many_keys_and_none(
    info: StoreInfo, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None, one, one that is missing, one key very often, and more than fit into one message, block or call."""
    monkeypatch.setattr("featurestore.flight.client._CALL_BYTES", 34 << 20)
    store = make_store(tmp_path / "store", info.model_copy(update={"dim": 2048}), 300)
    known = keys_of_uris(["images/1.jpg"])
    server = serve(store)
    with connect(server.address, missing="zeros") as client:
        for keys_U in (known[:0], known, np.array([3]), np.repeat(known, 5_000), np.resize(any_keys(300), 10_000)):
            client.missing_count = 0
            assert_same(client, store, tmp_path, keys_U)
        out = np.empty((1, 2048), np.uint16)
        assert client.lookup(known, out=out).features_UD is out
        with pytest.raises(ValueError, match="out is"):
            client.lookup(known, out=out[:, ::2])
    assert 10_000 * store.info.row_bytes > 34 << 20


@pytest.mark.long
def test_missing_policies_and_two_clients_in_two_threads_each(info: StoreInfo, serve: Serve, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", info)
    server = serve(store)
    gone, keys_U = keys_of_uris(["images/7.jpg", "images/8.jpg"]), any_keys()
    with connect(server.address) as client, pytest.raises(MissingKeysError, match=str(gone[0])):
        client.lookup(gone)
    for missing in ("zeros", "learned"):
        with connect(server.address, missing=missing) as client:
            found = client.lookup(gone)
            assert found.missing_U.tolist() == [True, False] and not found.features_UD[0].any()
            assert client.missing_count == 1 and client.missing_policy == missing
    with FeaturePartition.load(store, cache_dir=tmp_path / "cache", missing="zeros") as partition:
        expected = partition.lookup(keys_U).features_UD.tobytes()
    with (
        connect(server.address, missing="zeros") as one,
        connect(server.address, missing="zeros") as two,
        ThreadPoolExecutor(4) as pool,
    ):
        answers = pool.map(lambda client: client.lookup(keys_U).features_UD.tobytes(), [one, two] * 20)
        assert [*answers] == [expected] * 40


@pytest.mark.long
def test_a_snapshot_committed_meanwhile(info: StoreInfo, store: FeatureStore, serve: Serve, tmp_path: Path) -> None:
    """Who is connected keeps what it has; who connects next gets the newest; both numbers can be asked for."""
    store.put(make_rows(50, info))
    server = serve(store, "--poll-s", "0.1")
    keys_U = keys_of_uris([f"images/{i}.jpg" for i in range(60)])
    with connect(server.address, missing="zeros") as before:
        old = before.lookup(keys_U)
        store.put(make_rows(60, info, seed=2))
        server.wait_for("offers snapshot 2")
        assert before.lookup(keys_U).features_UD.tobytes() == old.features_UD.tobytes()
    with connect(server.address) as after, connect(server.address, version=1, missing="zeros") as first:
        assert (after.snapshot_version, first.snapshot_version) == (2, 1)
        assert_same(after, store, tmp_path, keys_U)
        assert first.lookup(keys_U).features_UD.tobytes() == old.features_UD.tobytes()
    with pytest.raises(SnapshotNotFoundError, match="no snapshot 3"):
        connect(server.address, version=3)
    fixed = serve(store, "--version", "1")
    with pytest.raises(SnapshotNotFoundError, match=r"snapshot 1 of .* alone"):
        connect(fixed.address, version=2)


@pytest.mark.long
def test_a_snapshot_that_expires_meanwhile(info: StoreInfo, store: FeatureStore, serve: Serve) -> None:
    """It is there for as long as the server has it open, and a clear error afterwards."""
    store.put(make_rows(50, info))
    server = serve(store, "--poll-s", "0.1")
    keys_U = make_rows(50, info).keys_N
    with connect(server.address) as client:
        old = client.lookup(keys_U).features_UD.tobytes()
        store.put(make_rows(60, info, seed=2))
        expire(store, keep_last=1, keep_days=0, grace_days=0)
        server.wait_for("offers snapshot 2")
        assert client.lookup(keys_U).features_UD.tobytes() == old
        server.end()
        serve(store, "--port", str(server.port))
        with pytest.raises(SnapshotNotFoundError, match="1 has expired"):
            lookup_once_up(client, keys_U)
