"""SQL sees what a plain model of the store says: after any commits, the newest row of each key and no removed one."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from featurestore import FeatureRows, FeatureStore, QuarantineRow, StoreInfo, key_of_uri
from featurestore.errors import CorruptFileError, FeatureStoreError, QueryError
from featurestore.format.shard import ShardReader
from featurestore.sql import query
from featurestore.sql.query import sql_reader
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import expire
from featurestore.upkeep.history import pin
from tests.featurestore.conftest import MakeRows

DIM = 8


def ask(store: FeatureStore, text: str, version: int | None = None) -> list[dict[str, Any]]:
    with sql_reader(store, store.snapshot(version), text) as reader:
        return reader.read_all().to_pylist()


@dataclass
class Model:
    """What a store must hold: uri -> (width, feature as float32 that bfloat16 can hold)."""

    store: FeatureStore
    rng: random.Random
    live: dict[str, tuple[int, list[float]]] = field(default_factory=dict)
    kept: dict[int, dict[str, tuple[int, list[float]]]] = field(default_factory=dict)

    def step(self) -> None:
        """Put, replace, delete or compact at random, and note what each snapshot holds."""
        kind = self.rng.choice(["put", "put", "put", "delete", "compact"])
        uris = self.rng.sample([f"{number}.jpg" for number in range(60)], self.rng.randint(1, 25))
        if kind == "put":
            rows = {
                uri: (self.rng.randint(1, 999), [float(self.rng.randint(-99, 99)) for _ in range(DIM)]) for uri in uris
            }
            self.live |= rows
            values = np.array([feature for _, feature in rows.values()], np.float32)
            widths = [width for width, _ in rows.values()]
            self.store.put(FeatureRows.of(list(rows), values, widths=widths))
        elif kind == "delete":
            self.live = {uri: row for uri, row in self.live.items() if uri not in uris}
            self.store.delete([key_of_uri(uri) for uri in uris])
        else:
            compact(self.store, force=True)
        self.kept[self.store.snapshot().version] = dict(self.live)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_random_commits_against_a_dict(seed: int, info: StoreInfo, tmp_path: Path) -> None:
    model = Model(FeatureStore.create(tmp_path / "store", info), random.Random(seed))
    for _ in range(10):
        model.step()
    for version, live in model.kept.items():
        rows = ask(model.store, "select uri, key, width, feature from images", version)
        assert {row["uri"]: (row["width"], row["feature"]) for row in rows} == live
        assert len(rows) == len(live) and all(row["key"] == key_of_uri(row["uri"]) for row in rows)
        (total,) = ask(model.store, "select count(*) n, sum(width) w, sum(feature[3]) f from images", version)
        assert total["n"] == len(live)
        assert total["w"] == (sum(width for width, _ in live.values()) if live else None)
        assert total["f"] == (sum(feature[2] for _, feature in live.values()) if live else None)
        table = model.store.snapshot(version).to_arrow()
        assert {row["uri"]: (row["width"], row["feature"]) for row in table.to_pylist()} == live
    joined = "select a.uri from images a join images b on a.key = b.key where b.width > 500 order by 1"
    expected = sorted(uri for uri, (width, _) in model.live.items() if width > 500)
    assert [row["uri"] for row in ask(model.store, joined)] == expected


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("select count(*) from images", ["key"]),
        ("select uri from images where width > 3 order by height", ["uri", "width", "height"]),
        ("select feature[1] from images", ["feature"]),
        ("select * from images", None),
        ("select i from images i", None),
        ("select * exclude (feature, source_tag) from images", ["key", "uri", "content_digest", "width", "height"]),
        ("with x as (select * from images) select max(width) from x", ["width"]),
        ("select a.key from images a join images b on a.width = b.height", ["key", "width", "height"]),
        ("select typeof(feature) from images", ["key"]),
        ("select * from shards", []),
    ],
)
def test_only_the_columns_of_the_query_are_read(
    text: str,
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
    assert ask(store, text)
    assert read == set(store.snapshot().to_arrow().schema.names if columns is None else columns)


def test_the_other_tables(store: FeatureStore, info: StoreInfo, make_rows: MakeRows) -> None:
    store.put(make_rows(40, info))
    store.delete(make_rows(3, info).keys_N)
    store.add_quarantine([QuarantineRow(7, "bad.jpg", "no image", 86_400.0)])
    pin(store, "mine", 1)
    assert ask(store, "select key, uri, reason, since::text since from quarantine") == [
        {"key": 7, "uri": "bad.jpg", "reason": "no image", "since": "1970-01-02 00:00:00"}
    ]
    snapshots = ask(store, "select version, operation, rows, pins, committed <= now()::timestamp ago from snapshots")
    assert [(row["version"], row["operation"], row["rows"], row["pins"]) for row in snapshots] == [
        (2, "delete", 43, []),
        (1, "put", 40, ["mine"]),
    ]
    (sums,) = ask(store, "select count(*) n, sum(rows) r, sum(tombstones) t, sum(bytes) b, sum(files) f from shards")
    manifest = store.snapshot().manifest
    assert sums == {"n": 8, "r": 40, "t": 3, "b": manifest.file_bytes, "f": manifest.num_files}
    (old,) = ask(store, "select sum(tombstones) t from shards", version=1)
    assert old == {"t": 0}
    expire(store, keep_last=1, keep_days=0, grace_days=0)
    assert len(ask(store, "from snapshots")) == 2  # one is pinned


def test_an_empty_store(store: FeatureStore) -> None:
    assert ask(store, "select * from images") == ask(store, "from snapshots") == ask(store, "from quarantine") == []
    assert ask(store, "select count(*) n from shards") == [{"n": 8}]
    assert len(store.snapshot().to_arrow()) == 0


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("drop table images", "one SELECT"),
        ("select 1; select 2", "one SELECT"),
        ("copy images to '{}/x.csv'", "one SELECT"),
        ("attach '{}/x.db'", "one SELECT"),
        ("set enable_external_access = true", "one SELECT"),
        (" ", "nothing"),
        ("select nosuch from images", "nosuch"),
        ("select * from nosuch", "nosuch"),
        ("selec 1", "selec"),
        ("select error('stop')", "stop"),
        ("select cast(uri as int) from images", "Conversion"),
        ("select * from read_csv('{}/secret.csv')", "disabled"),
        ("select * from '{}/secret.csv'", "disabled"),
        ("select * from read_text('{}/secret.csv')", "disabled"),
        ("select * from store", "there is no table store; the tables are images, quarantine"),  # no variable of ours
    ],
)
def test_what_is_no_query_of_a_store(
    text: str, word: str, store: FeatureStore, info: StoreInfo, make_rows: MakeRows, tmp_path: Path
) -> None:
    """And a query reads no file and writes none."""
    store.put(make_rows(20, info))
    (tmp_path / "secret.csv").write_text("a\n1\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(QueryError, match=word):
        ask(store, text.format(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_file_is_named(store: FeatureStore, info: StoreInfo, make_rows: MakeRows) -> None:
    store.put(make_rows(200, info))
    path = Path(store.url) / store.snapshot().manifest.entries[0].path
    data = bytearray(path.read_bytes())
    data[200:260] = bytes(60)
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match=path.name):
        ask(store, "select sum(feature[1]), max(uri) from images")


def test_without_duckdb(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "duckdb", None)
    with pytest.raises(FeatureStoreError, match=r"pip install duckdb"):
        ask(store, "select 1")


@pytest.mark.long
def test_memory_is_bounded(
    info: StoreInfo, make_rows: MakeRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scan holds a few megabytes of the rows, whatever their number; so does what it hands to a file."""
    wide = FeatureStore.create(tmp_path / "wide", info.model_copy(update={"dim": 4096}))
    wide.put(make_rows(4_000, wide.info))
    monkeypatch.setattr(query, "_BATCH_ROWS", 256)
    before = pa.total_allocated_bytes()
    most, count = 0, 0
    with sql_reader(wide, wide.snapshot(), "select key, feature from images") as reader:
        for batch in reader:
            count += len(batch)
            most = max(most, pa.total_allocated_bytes() - before)
    assert count == 4_000 and most < 4_000 * wide.info.dim * 4 / 2


def test_an_error_that_comes_after_rows_is_the_querys_and_none_of_a_file(store: FeatureStore) -> None:
    late = "select if(x = 900_000, error('at the end'), x) from range(1_000_000) as numbers(x)"
    with (
        pytest.raises(QueryError, match=r"^Invalid Input Error: at the end$"),
        sql_reader(store, store.snapshot(), late) as reader,
    ):
        assert len(reader.read_next_batch()) > 0
        reader.read_all()
