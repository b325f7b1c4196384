"""Live rows as Arrow tables: the numbers that the codec decodes, the columns asked for, and no row twice."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from featurestore import FeatureRows, FeatureStore, StoreInfo, keys_of_uris
from featurestore.errors import CorruptFileError
from featurestore.format.shard import ShardReader
from featurestore.upkeep.compaction import compact
from tests.featurestore.conftest import MakeRows


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_decoded_and_as_stored(dtype: str, info: StoreInfo, tmp_path: Path) -> None:
    """Against `get`, after a key was replaced and another removed."""
    info = info.model_copy(update={"dtype": dtype})
    store = FeatureStore.create(tmp_path / "store", info)
    uris = [f"{number}.jpg" for number in range(100)]
    rng = np.random.default_rng(0)
    store.put(FeatureRows.of(uris, rng.standard_normal((100, 8)).astype(np.float32), widths=np.arange(100)))
    store.put(FeatureRows.of(uris[:9], rng.standard_normal((9, 8)).astype(np.float32), widths=np.full(9, 7)))
    store.delete(keys_of_uris(uris[5:8]))
    snapshot = store.snapshot()
    table, stored = snapshot.to_arrow(), snapshot.to_arrow(["feature", "key"], decode=False)
    kept = uris[:5] + uris[8:]
    assert sorted(table["uri"].to_pylist()) == sorted(kept) and len(stored) == len(kept) == snapshot.num_rows
    keys_M = table["key"].to_numpy()
    np.testing.assert_array_equal(keys_M, keys_of_uris(table["uri"].to_pylist()))
    expected_MD = snapshot.get(keys_M)
    np.testing.assert_array_equal(np.array(table["feature"].to_pylist(), np.float32), store.codec.decode(expected_MD))
    assert stored.schema.names == ["feature", "key"]
    assert stored["feature"].to_pylist() == [bytes(row) for row in snapshot.get(stored["key"].to_numpy())]
    widths = dict(zip(table["uri"].to_pylist(), table["width"].to_pylist(), strict=True))
    assert [widths[uri] for uri in (uris[0], uris[8], uris[9], uris[99])] == [7, 7, 9, 99]
    assert snapshot.arrow_reader().read_all().equals(table)


def test_types_and_columns(store: FeatureStore, info: StoreInfo, make_rows: MakeRows) -> None:
    store.put(make_rows(10, info))
    snapshot = store.snapshot()
    table = snapshot.to_arrow()
    assert table.schema.names == ["key", "uri", "content_digest", "source_tag", "width", "height", "feature"]
    assert table.schema.field("feature").type == pa.list_(pa.float32(), 8)
    assert snapshot.to_arrow(decode=False).schema.field("feature").metadata == {b"dtype": b"bfloat16", b"shape": b"[8]"}
    assert snapshot.to_arrow(["width"]).schema.names == ["width"]
    for columns in (["deleted"], ["key", "key"], [], ["x"]):
        with pytest.raises(ValueError, match="choose from key, uri"):
            snapshot.to_arrow(columns)


def test_a_stream_has_the_shards_asked_for(store: FeatureStore, info: StoreInfo, make_rows: MakeRows) -> None:
    store.put(make_rows(200, info))
    snapshot = store.snapshot()
    for shards in ([], [3], [5, 1]):
        expected = [key for shard in shards for key in snapshot.read_shard(shard).keys_N.tolist()]
        assert snapshot.arrow_reader(["key"], shards=shards).read_all()["key"].to_pylist() == expected


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_random_commits_against_a_dict(seed: int, store: FeatureStore) -> None:
    """Every snapshot has the newest row of each key, and no deleted one."""
    rng = random.Random(seed)
    live: dict[str, tuple[int, list[float]]] = {}
    snapshots: dict[int, dict[str, tuple[int, list[float]]]] = {}
    for _ in range(10):
        uris = rng.sample([f"{number}.jpg" for number in range(60)], rng.randint(1, 25))
        kind = rng.choice(["put", "put", "put", "delete", "compact"])
        if kind == "put":
            rows = {uri: (rng.randint(1, 999), [float(rng.randint(-99, 99)) for _ in range(8)]) for uri in uris}
            live |= rows
            values = np.array([feature for _, feature in rows.values()], np.float32)
            store.put(FeatureRows.of(uris, values, widths=[width for width, _ in rows.values()]))
        elif kind == "delete":
            live = {uri: row for uri, row in live.items() if uri not in uris}
            store.delete(keys_of_uris(uris))
        else:
            compact(store, force=True)
        snapshots[store.snapshot().version] = dict(live)
    for version, expected in snapshots.items():
        rows_M = store.snapshot(version).to_arrow().to_pylist()
        assert {row["uri"]: (row["width"], row["feature"]) for row in rows_M} == expected
        assert len(rows_M) == len(expected)


@pytest.mark.parametrize("columns", [["uri", "width"], ["feature"], None])
def test_only_the_named_columns_are_read(
    columns: list[str] | None,
    store: FeatureStore,
    info: StoreInfo,
    make_rows: MakeRows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store.put(make_rows(20, info))
    read: set[str] = set()
    live_tables = ShardReader.live_tables

    def noted(self: ShardReader, names: Any) -> Any:
        read.update(names)
        return live_tables(self, names)

    monkeypatch.setattr(ShardReader, "live_tables", noted)
    table = store.snapshot().arrow_reader(columns).read_all()
    assert len(table) == 20 and read == set(table.schema.names)


def test_a_damaged_file_is_named(store: FeatureStore, info: StoreInfo, make_rows: MakeRows) -> None:
    store.put(make_rows(200, info))
    path = Path(store.url) / store.snapshot().manifest.entries[0].path
    data = bytearray(path.read_bytes())
    data[200:260] = bytes(60)
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match=path.name):
        store.snapshot().to_arrow()


@pytest.mark.long
def test_a_stream_holds_a_part_of_the_rows(info: StoreInfo, make_rows: MakeRows, tmp_path: Path) -> None:
    wide = FeatureStore.create(tmp_path / "wide", info.model_copy(update={"dim": 4096}))
    wide.put(make_rows(4_000, wide.info))
    before = pa.total_allocated_bytes()
    most, count = 0, 0
    for batch in wide.snapshot().arrow_reader(["key", "feature"]):
        count += len(batch)
        most = max(most, pa.total_allocated_bytes() - before)
    assert count == 4_000 and most < 4_000 * wide.info.dim * 4 / 2
