"""Batches: nothing lost or repeated for any number of ranks, the content of every field, and files that are refused."""

import itertools
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore.storage.storage import Storage
from trainer.comm import SoloComm
from trainer.errors import DataError, SchemaError
from trainer.samples.batch import Batch
from trainer.samples.columns import aligned_columns, rules_of
from trainer.samples.prefetch import ReadAhead
from trainer.samples.reader import SampleReader, known_ads, open_index
from trainer.schema import Field, Schema, load_schema

SCHEMA = Schema(
    fields=(
        *load_schema().fields,
        Field(name="serial", side="ad", kind="id", column="ad_serial"),
        Field(name="session", side="user", kind="id"),
    )
)
Write = Callable[..., list[pa.Table]]


def _reader(folder: Path, rank: int = 0, num_ranks: int = 1, **options: Any) -> SampleReader:
    schema = options.pop("schema", SCHEMA)
    index = open_index(SoloComm(), str(folder), "train", schema)
    arguments = {"batch_size": 16, "seed": 3, "window_groups": 2} | options
    return SampleReader(index, schema, rank=rank, num_ranks=num_ranks, **arguments)


def _serials(batch: Batch) -> list[int]:
    return batch.fields["serial"].values_N.tolist()


def _rows(batch: Batch) -> list[tuple[Any, ...]]:
    """Every sample of a batch as one tuple of all its values, its group's among them."""
    user_fields = ["user", "session", "behavior_item", "behavior_category", "behavior_image_id", "behavior_image"]
    split = {
        name: np.split(batch.fields[name].values_N, np.cumsum(batch.fields[name].lengths_M)[:-1])
        for name in user_fields
    }
    per_group = [
        tuple(tuple(split[name][group].tolist()) for name in user_fields)
        for group in range(len(batch.fields["user"].lengths_M))
    ]
    ads = [batch.fields[name].values_N for name in ("serial", "ad_item", "ad_image", "ad_image_id", "ad_scene")]
    return [
        (*(int(field[b]) for field in ads), int(batch.label_B[b]), int(batch.group_id_B[b]), per_group[g])
        for b, g in enumerate(batch.group_of_sample_B)
    ]


def _expected_rows(tables: list[pa.Table]) -> dict[int, tuple[Any, ...]]:
    found = {}
    for row in pa.concat_tables(tables).to_pylist():
        behaviors = [tuple(row[f"behavior_{name}"]) for name in ("item", "category", "image", "image")]
        user = ((row["user"],), (row["session"],), *behaviors)
        ads = zip(row["ad_serial"], row["ad_item"], row["ad_image"], row["ad_image"], row["ad_scene"], row["label"])  # noqa: B905
        found.update({ad[0]: (*ad, row["user"], user) for ad in ads})
    return found


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, write_samples: Write) -> tuple[Path, list[pa.Table]]:
    folder = tmp_path_factory.mktemp("samples")
    return folder, write_samples(folder / "train", [30, 1, 22])


def test_every_value_of_every_sample(samples: tuple[Path, list[pa.Table]]) -> None:
    folder, tables = samples
    expected = _expected_rows(tables)
    for options in ({}, {"seed": None}, {"window_groups": 1, "batch_size": 5}, {"window_groups": 100}):
        rows = [row for batch in _reader(folder, **options).batches() for row in _rows(batch)]
        assert {row[0]: row for row in rows} == expected
        assert len(rows) == len(expected)


@pytest.mark.long
@pytest.mark.parametrize("batch_size", [1, 7, 16, 64, 1_000])
@pytest.mark.parametrize(("num_ranks", "seed"), [(2, 3), (3, None), (8, 3)])
def test_ranks_together_have_the_batches_of_one_rank(
    samples: tuple[Path, list[pa.Table]], batch_size: int, num_ranks: int, seed: int | None
) -> None:
    folder, _ = samples
    alone = list(_reader(folder, batch_size=batch_size, seed=seed).batches(epoch=1))
    total = sum(batch.num_samples for batch in alone)
    assert [batch.num_samples for batch in alone[:-1]] == [min(batch_size, total)] * (len(alone) - 1)
    ranks = [
        list(_reader(folder, rank, num_ranks, batch_size=batch_size, seed=seed).batches(epoch=1))
        for rank in range(num_ranks)
    ]
    for step, batch in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        assert [row for part in parts for row in _rows(part)] == _rows(batch)
        sizes = [part.num_samples for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert {part.global_samples for part in parts} == {batch.num_samples} == {batch.global_samples}
        assert {(part.position.epoch, part.position.step) for part in parts} == {(1, step)}
        assert [part.first_sample for part in parts] == [sum(sizes[:rank]) for rank in range(num_ranks)]


@pytest.mark.long
@pytest.mark.parametrize("num_ranks", [1, 2, 5, 200])
def test_evaluation_order_has_each_sample_once_and_reads_its_own_part(
    samples: tuple[Path, list[pa.Table]], num_ranks: int
) -> None:
    folder, tables = samples
    readers = [_reader(folder, rank, num_ranks, seed=None, by_part=True, batch_size=32) for rank in range(num_ranks)]
    assert len({reader.steps_per_epoch for reader in readers}) == 1
    batches = [list(reader.batches()) for reader in readers]
    serials = [serial for rank in batches for batch in rank for serial in _serials(batch)]
    assert sorted(serials) == serials == sorted(_expected_rows(tables))
    for step in range(readers[0].steps_per_epoch):
        parts = [rank[step] for rank in batches]
        assert {part.global_samples for part in parts} == {sum(part.num_samples for part in parts)}


def test_order_depends_on_seed_and_epoch_alone(samples: tuple[Path, list[pa.Table]]) -> None:
    folder, _ = samples

    def order(seed: int, epoch: int) -> list[int]:
        return [serial for batch in _reader(folder, seed=seed).batches(epoch) for serial in _serials(batch)]

    orders = [order(3, 0), order(3, 1), order(4, 0)]
    assert order(3, 0) == orders[0]
    assert len({tuple(each) for each in orders}) == 3
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    sessions = [
        [next(iter(batch.fields["session"].values_N)) // 7 for batch in _reader(folder, window_groups=1).batches(epoch)]
        for epoch in (0, 1)
    ]
    assert sessions[0] != sessions[1], "row groups are shuffled too, in each epoch otherwise"


def test_reading_can_start_at_any_step(samples: tuple[Path, list[pa.Table]]) -> None:
    full = [_rows(batch) for batch in _reader(samples[0]).batches(epoch=2)]
    assert [_rows(batch) for batch in _reader(samples[0]).batches(epoch=2, first_step=5)] == full[5:]


def test_an_epoch_in_pieces_that_other_numbers_of_ranks_read(samples: tuple[Path, list[pa.Table]]) -> None:
    folder, _ = samples
    expected = [_rows(batch) for batch in _reader(folder).batches(epoch=1)]
    found = []
    for num_ranks, first, last in ((4, 0, 3), (1, 3, 4), (3, 4, 7), (2, 7, len(expected))):
        ranks = [_reader(folder, rank, num_ranks).batches(epoch=1, first_step=first) for rank in range(num_ranks)]
        steps = itertools.islice(zip(*ranks, strict=True), last - first)
        found += [[row for part in parts for row in _rows(part)] for parts in steps]
    assert found == expected


def test_ranks_without_samples_have_empty_fields(samples: tuple[Path, list[pa.Table]]) -> None:
    batch = next(_reader(samples[0], rank=0, num_ranks=4, batch_size=2).batches())
    assert batch.num_samples == 0
    assert batch.global_samples == 2
    assert all(len(field.values_N) == len(field.lengths_M) == 0 for field in batch.fields.values())
    assert {field.values_N.dtype for field in batch.fields.values()} == {np.dtype(np.int64)}
    assert {field.lengths_M.dtype for field in batch.fields.values()} == {np.dtype(np.int32)}


def test_dense_and_nested_fields(tmp_path: Path, sample_table: Callable[..., pa.Table]) -> None:
    table = sample_table(9)
    counts = np.diff(table.column("label").combine_chunks().offsets.to_numpy())
    tags = [[list(range(n)) for n in range(count)] for count in counts]
    table = table.append_column("ad_tags", pa.array(tags, pa.list_(pa.list_(pa.int32()))))
    table = table.append_column("ad_price", pa.array([[float(n) for n in range(count)] for count in counts]))
    taste = np.arange(18, dtype=np.float32)
    table = table.append_column("taste", pa.FixedSizeListArray.from_arrays(pa.array(taste), 2))
    (tmp_path / "train").mkdir()
    pq.write_table(table, tmp_path / "train" / "a.parquet", row_group_size=4)
    schema = Schema(
        fields=(
            Field(name="ad_item", side="ad", kind="id"),
            Field(name="ad_tags", side="ad", kind="multi_id"),
            Field(name="ad_price", side="ad", kind="dense"),
            Field(name="taste", side="user", kind="dense", width=2),
        )
    )
    (batch,) = _reader(tmp_path, schema=schema, seed=None, batch_size=10_000).batches()
    assert batch.fields["ad_tags"].lengths_M.tolist() == [n for count in counts for n in range(count)]
    assert batch.fields["ad_tags"].values_N.tolist() == [v for row in tags for tag in row for v in tag]
    assert batch.dense["ad_price"].tolist() == [[float(n)] for count in counts for n in range(count)]
    np.testing.assert_array_equal(batch.dense["taste"], taste.reshape(9, 2))


def _replaced(table: pa.Table, column: str, values: Any) -> pa.Table:
    return table.set_column(table.schema.get_field_index(column), column, values)


def _edited(table: pa.Table, column: str, row: int, value: Any) -> pa.Table:
    values = table.column(column).to_pylist()
    values[row] = value
    return _replaced(table, column, pa.array(values, table.schema.field(column).type))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop_columns(["user", "ad_scene"]), "(or string); column ad_scene is missing, expected"),
        (
            lambda table: _replaced(table, "user", table.column("user").cast(pa.bool_())),
            "column user is bool, expected integer (or string)",
        ),
        (
            lambda table: _replaced(table, "ad_item", table.column("user")),
            "column ad_item is int64, expected list<integer>",
        ),
        (lambda table: _replaced(table, "user", table.column("user").cast(pa.float64())), "column user is double"),
        (lambda table: _replaced(table, "user", table.column("ad_item")), "column user is list<"),
        (lambda table: table.append_column("user", table.column("user")), "column user is in it 2 times"),
    ],
)
def test_wrong_columns_are_refused_before_reading(
    tmp_path: Path, write_samples: Write, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    write_samples(tmp_path / "train", [5, 5])
    path = tmp_path / "train" / "day=2026-01-02.parquet"
    pq.write_table(change(pq.read_table(path, partitioning=None)), path)
    with pytest.raises(SchemaError) as caught:
        open_index(SoloComm(), str(tmp_path), "train", SCHEMA)
    assert message in str(caught.value)
    assert "day=2026-01-02.parquet" in str(caught.value)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("label", lambda n: [2] * n, "column label has 2; a label is 0 or 1"),
        ("label", lambda n: [-1] * n, "column label has -1; a label is 0 or 1"),
        ("label", lambda n: [], "column label is an empty list"),
        ("label", lambda n: None, "column label is null"),
        ("label", lambda n: [None] * n, "column label has a null in its list"),
        ("ad_item", lambda n: [1] * (n + 1), "each impression needs one entry in both"),
        ("behavior_image", lambda n: None, "column behavior_image is null"),
        ("behavior_image", lambda n: [1] * 9, "column behavior_image has 9 entries, behavior_item has"),
        ("behavior_category", lambda n: [1] * 9, "each behaviour needs one entry in both"),
        ("behavior_item", lambda n: [1, None], "column behavior_item has a null in its list"),
        ("user", lambda n: None, "column user is null"),
    ],
)
def test_wrong_values_are_named(
    tmp_path: Path, write_samples: Write, column: str, value: Callable[[int], Any], message: str
) -> None:
    (table,) = write_samples(tmp_path / "train", [20])
    path = tmp_path / "train" / "day=2026-01-01.parquet"
    count = len(table.column("label")[17])
    pq.write_table(_edited(table, column, 17, value(count)), path, row_group_size=7)
    with pytest.raises(DataError) as caught:
        list(_reader(tmp_path).batches())
    assert message in str(caught.value)
    assert "day=2026-01-01.parquet, row 17" in str(caught.value)


def test_which_lists_belong_together() -> None:
    names = ["behavior_item", "behavior_image", "behavior_buy_item", "behavior_buy_image", "behavior_note", "user_item"]
    fields = [Field(name=name, side="user", kind="multi_id") for name in names]
    fields += [Field(name="behavior_age_item", side="user", kind="dense", width=2)]
    fields += [Field(name=f"ad_{name}", side="ad", kind="id") for name in ("item", "image")]
    rules = rules_of(Schema(fields=tuple(fields), new_ad_field="ad_item"))
    assert aligned_columns(rules) == [names[:2], names[2:4]]


def test_lists_of_their_own_may_have_any_length(tmp_path: Path, sample_table: Callable[..., pa.Table]) -> None:
    table = sample_table(4).append_column("user_tags", pa.array([[1], [], [2, 3], [4] * 9]))
    table = table.append_column("behavior_words", pa.array([[1] * 7, [], [2, 3], [4]]))
    (tmp_path / "train").mkdir()
    pq.write_table(table, tmp_path / "train" / "a.parquet")
    more = [Field(name=name, side="user", kind="multi_id") for name in ("user_tags", "behavior_words")]
    schema = Schema(fields=(*SCHEMA.fields, *more))
    index = open_index(SoloComm(), str(tmp_path), "train", schema)
    assert sum(batch.num_samples for batch in SampleReader(index, schema, batch_size=8).batches()) == index.num_samples


def test_dense_numbers_have_to_be_finite(tmp_path: Path, sample_table: Callable[..., pa.Table]) -> None:
    table = sample_table(4).append_column("height", pa.array([1.0, 2.0, float("nan"), 3.0]))
    (tmp_path / "train").mkdir()
    pq.write_table(table, tmp_path / "train" / "a.parquet")
    schema = Schema(fields=(*SCHEMA.fields, Field(name="height", side="user", kind="dense")))
    with pytest.raises(DataError, match=r"a\.parquet, row 2: column height has nan"):
        list(_reader(tmp_path, schema=schema).batches())


def test_no_samples_names_the_job(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"build_samples\.py"):
        open_index(SoloComm(), str(tmp_path), "train", SCHEMA)
    (tmp_path / "train").mkdir()
    pq.write_table(sample_schema_only(), tmp_path / "train" / "a.parquet")
    with pytest.raises(DataError, match=r"build_samples\.py"):
        open_index(SoloComm(), str(tmp_path), "train", SCHEMA)


def sample_schema_only() -> pa.Table:
    names = {field.column_name: field for field in SCHEMA.fields} | {"label": None}
    lists = {name: pa.array([], pa.list_(pa.int64())) for name in names}
    return pa.table(lists | {name: pa.array([], pa.int64()) for name in ("user", "session")})


def test_damaged_files_are_named(tmp_path: Path, write_samples: Write) -> None:
    write_samples(tmp_path / "train", [30, 30])
    path = tmp_path / "train" / "day=2026-01-02.parquet"
    content = path.read_bytes()
    reader = _reader(tmp_path)
    path.write_bytes(content[:20] + bytes(400) + content[420:])
    with pytest.raises(DataError, match=r"day=2026-01-02\.parquet, row group \d+ is damaged"):
        list(reader.batches())
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"day=2026-01-02\.parquet is not a readable Parquet file"):
        _reader(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"day=2026-01-02\.parquet is gone"):
        list(reader.batches())


def test_files_that_change_during_a_run_are_noticed(tmp_path: Path, write_samples: Write) -> None:
    write_samples(tmp_path / "train", [30])
    reader = _reader(tmp_path)
    shutil.rmtree(tmp_path / "train")
    write_samples(tmp_path / "train", [30], seed=1)
    with pytest.raises(DataError, match=r"day=2026-01-01\.parquet has changed since the run began"):
        list(reader.batches())


def test_samples_are_read_through_the_store_s_door(samples: tuple[Path, list[pa.Table]]) -> None:
    folder, _ = samples
    storage = Storage("memory://trainer-samples")
    for file in (folder / "train").iterdir():
        storage.write_bytes(f"train/{file.name}", file.read_bytes())
    index = open_index(SoloComm(), storage.url, "train", SCHEMA)
    batches = SampleReader(index, SCHEMA, batch_size=16, seed=3, window_groups=2).batches()
    assert [_rows(batch) for batch in batches] == [_rows(batch) for batch in _reader(folder).batches()]


def test_days_are_found_in_either_split(tmp_path: Path, write_samples: Write) -> None:
    tables = write_samples(tmp_path / "train", [10, 12, 14])
    (tmp_path / "test").mkdir()
    third = tmp_path / "train" / "day=2026-01-03.parquet"
    alone = open_index(SoloComm(), str(tmp_path), "test", SCHEMA, ["2026-01-03"])
    third.rename(tmp_path / "test" / "day=2026-01-03-000.parquet")
    (tmp_path / "test" / "day=2026-01-03-000.parquet").rename(tmp_path / "test" / third.name)
    index = open_index(SoloComm(), str(tmp_path), "train", SCHEMA, ["2026-01-03", "2026-01-01"])
    reader = SampleReader(index, SCHEMA, batch_size=1_000)
    found = [serial for batch in reader.batches() for serial in _serials(batch)]
    expected = [s for t in (tables[0], tables[2]) for row in t["ad_serial"].to_pylist() for s in row]
    assert found == expected
    moved = open_index(SoloComm(), str(tmp_path), "train", SCHEMA, ["2026-01-03"])
    assert moved.layout_digest == alone.layout_digest != index.layout_digest
    assert open_index(SoloComm(), str(tmp_path), "train", SCHEMA, []).num_samples == 0
    with pytest.raises(DataError, match=r"no samples of 2026-01-09: its files are from 2026-01-01 to 2026-01-03"):
        open_index(SoloComm(), str(tmp_path), "train", SCHEMA, ["2026-01-09"])
    for number, file in enumerate(sorted(tmp_path.glob("*/*.parquet"))):
        file.rename(file.with_name(f"part-{number}.parquet"))
    with pytest.raises(DataError, match="its files are not named by day"):
        open_index(SoloComm(), str(tmp_path), "train", SCHEMA, ["2026-01-01"])


def test_one_column_read_two_ways_is_refused() -> None:
    clash = Schema(fields=(*SCHEMA.fields, Field(name="items", side="user", kind="id", column="ad_item")))
    with pytest.raises(SchemaError, match="column ad_item: field items reads it as integer of side user"):
        rules_of(clash)


def test_known_ads(samples: tuple[Path, list[pa.Table]]) -> None:
    folder, tables = samples
    index = open_index(SoloComm(), str(folder), "train", SCHEMA)
    expected = sorted({item for row in pa.concat_tables(tables).column("ad_item").to_pylist() for item in row})
    assert known_ads(SoloComm(), index, SCHEMA).tolist() == expected


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_reading_ahead_keeps_order_and_hands_errors_on(samples: tuple[Path, list[pa.Table]], depth: int) -> None:
    folder, _ = samples
    plain = [_serials(batch) for batch in _reader(folder).batches()]

    def failing() -> Iterator[Batch]:
        yield from _reader(folder).batches()
        raise DataError("broken")

    ahead = ReadAhead(failing(), depth)
    assert [_serials(next(ahead)) for _ in plain] == plain
    with pytest.raises(DataError, match="broken"):
        next(ahead)


def test_reading_ahead_ends_its_thread(samples: tuple[Path, list[pa.Table]]) -> None:
    before = threading.active_count()
    ahead = ReadAhead(_reader(samples[0], batch_size=1).batches(), 2)
    next(ahead)
    assert threading.active_count() == before + 1
    ahead.close()
    assert threading.active_count() == before
    assert list(ahead) == []
