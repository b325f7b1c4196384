"""Vectors from elsewhere: every format gives its rows, bad ones are kept aside, and tasks that build shards fit."""

import re
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore.errors import InvalidRowsError
from featurestore.format.datafile import FeatureRows, to_bits
from featurestore.keys import key_of_uri
from featurestore.problems import Problem as StoreProblem
from featurestore.spec import StoreInfo
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore, SnapshotId
from featurestore.upkeep.remake import remake
from jobs import import_features
from pipeline import formats, import_vectors, store_run
from pipeline.import_vectors import extractor_of
from pipeline.problems import Problem
from pipeline.store_run import build_shards
from tests.cli import said
from tests.faulty import faulty
from tests.featurestore.contents import metadata_of
from tests.raised import raises, told

DIM = 6


@pytest.fixture
def job(connected, tmp_path):
    """Runs the job on the tests' cluster into tmp_path/features."""

    def run(source, *args, code=0, store=None):
        settings = ["--from", source, "--store", store or tmp_path / "features", *args]
        return said(import_features.app, *settings, code=code)

    return run


@pytest.fixture(name="vectors_ND")
def draw_vectors():
    return np.random.default_rng(0).normal(size=(40, DIM)).astype(np.float32)


def write_xdl(folder, keys, vectors_ND, number_of=lambda key: key % formats.NUM_FILES):
    folder.mkdir(exist_ok=True)
    for key, vector_D in zip(keys, vectors_ND, strict=False):
        with (folder / f"data.{number_of(int(key))}").open("ab") as file:
            file.write(np.int64(key).astype("<i8").tobytes() + vector_D.astype("<f4").tobytes())


def stored(path, keys):
    store = FeatureStore.open(path)
    return store.codec.decode(store.snapshot().get(list(keys)))


@pytest.fixture
def matrix(tmp_path):
    """Writes vectors and their keys as .npy files; returns the words that import them."""

    def save(vectors_ND, keys, name="a"):
        np.save(tmp_path / f"{name}.npy", vectors_ND)
        np.save(tmp_path / f"{name}-keys.npy", [*keys])
        return tmp_path / f"{name}.npy", "--keys", tmp_path / f"{name}-keys.npy"

    return save


def uris(path):
    return {row["key"]: row["uri"] for row in metadata_of(FeatureStore.open(path).snapshot()).to_pylist()}


def list_column(vectors_ND, kind):
    return pa.array([row_D.tolist() for row_D in vectors_ND], kind)


PARQUET_COLUMNS = {
    "fixed list": lambda v: list_column(v, pa.list_(pa.float32(), DIM)),
    "list of doubles": lambda v: list_column(v.astype(np.float64), pa.list_(pa.float64())),
    "large list": lambda v: list_column(v, pa.large_list(pa.float32())),
    "tensor": lambda v: pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.float32(), [DIM]), list_column(v, pa.list_(pa.float32(), DIM))
    ),
}


@pytest.mark.parametrize("kind", PARQUET_COLUMNS)
def test_parquet_in_every_form_of_a_vector(job, tmp_path, vectors_ND, kind, monkeypatch):
    monkeypatch.setattr("pipeline.formats.block_rows", lambda dim: 10)  # so that a file has several slices
    ids = [f"item/{n}" for n in range(40)]
    table = pa.table({"id": ids, "title": ["x"] * 40, "vector": PARQUET_COLUMNS[kind](vectors_ND)})
    (tmp_path / "text").mkdir()
    pq.write_table(table.slice(0, 25), tmp_path / "text/a.parquet", row_group_size=7)
    pq.write_table(table.slice(25), tmp_path / "text/b.parquet")
    text = job(tmp_path / "text", "--name", "text", "--dtype", "float32", "--part-size", 10)
    assert "rows 40 new 40 changed 0 unchanged 0" in text
    store = FeatureStore.open(tmp_path / "features")
    assert (store.info.dim, store.info.name, store.info.extractor.backbone) == (DIM, "text", "imported")
    assert uris(tmp_path / "features") == {key_of_uri(name): name for name in ids}
    np.testing.assert_array_equal(stored(tmp_path / "features", map(key_of_uri, ids)), vectors_ND)
    assert not list((tmp_path / "features/staging").glob("*/*"))


def test_parquet_with_keys_and_uris(job, tmp_path, vectors_ND):
    columns = {"key": pa.array(range(40), pa.int32()), "uri": [f"u{n}" for n in range(40)]}
    pq.write_table(pa.table(columns | {"feature": vectors_ND.tolist()}), tmp_path / "rows.parquet")
    job(tmp_path / "rows.parquet")
    assert uris(tmp_path / "features") == {n: f"u{n}" for n in range(40)}
    store = FeatureStore.open(tmp_path / "features")
    np.testing.assert_array_equal(store.snapshot().get(list(range(40))), to_bits(vectors_ND, "bfloat16"))


def test_bad_rows_of_parquet_are_quarantined_one_by_one(job, tmp_path):
    nan = float("nan")
    rows = [[7.0, 8.0], [1.0, 2.0], [1.0, nan], [1.0, 2.0, 3.0], None, [3.0, None], [4.0, 1e39], [5.0, 6.0]]
    table = pa.table({"key": [None, *range(7)], "feature": pa.array(rows, pa.list_(pa.float64()))})
    pq.write_table(table, tmp_path / "rows.parquet")
    text = job(tmp_path / "rows.parquet", "--dtype", "float32", "--part-size", 3)
    assert "rows 8 new 2" in text
    assert "quarantined 6: 3 not finite in float32 (key:1, key:4, key:5)" in text
    store = FeatureStore.open(tmp_path / "features")
    assert store.snapshot().keys().tolist() == [0, 6]
    assert stored(tmp_path / "features", [0, 6]).tolist() == [[1, 2], [5, 6]]
    assert {row.uri: row.reason for row in store.quarantine_rows()} == {
        "key:1": "not finite in float32", "key:2": "3 numbers instead of 2", "key:3": "no feature",
        "key:4": "not finite in float32", "key:5": "not finite in float32", "rows.parquet#0": "no key or uri",
    }  # fmt: skip
    assert store.snapshot().manifest.num_quarantined == 6
    job(tmp_path / "rows.parquet")
    assert len(store.quarantine_rows()) == 6
    assert len(list((tmp_path / "features/quarantine").iterdir())) == 1
    good = pa.table({"key": [1, 2], "feature": [[1.0, 1.0], [2.0, 2.0]]})
    pq.write_table(good, tmp_path / "good.parquet")
    assert "new 2 changed 0" in (text := job(tmp_path / "good.parquet"))
    assert "resolved 2 (were in quarantine)" in text
    assert len(store.quarantine_rows()) == 4


def test_slices_know_where_they_begin_and_ids_meet_their_rows_in_each(tmp_path, vectors_ND, monkeypatch):
    table = pa.table({"key": range(8), "feature": pa.array([[1.0, 2.0]] * 8)})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 4 * 4 * 2)  # four rows of two numbers
    slices = formats.plan_parquet(str(tmp_path / "rows.parquet"), None, None).slices
    assert [(each.groups, each.first_row, each.num_rows) for each in slices] == [((0, 1), 0, 4), ((2, 3), 4, 4)]
    monkeypatch.setattr(formats, "block_rows", lambda dim: 7)
    np.save((addresses := (tmp_path / "a.npy", tmp_path / "ids"))[0], vectors_ND)
    for end in ("", "\n"):
        (tmp_path / "ids").write_text("\n".join(f"é{n}" for n in range(40)) + end)
        source = formats.plan_matrix(*map(str, addresses))
        blocks = [block for piece in source.slices for block in piece.read(3)]
        assert [uri for block in blocks for uri in block.uris] == [f"é{n}" for n in range(40)]
        np.testing.assert_array_equal(np.concatenate([block.vectors_ND for block in blocks]), vectors_ND)
        assert max(map(len, blocks)) == 3
    (tmp_path / "ids").write_text("\n".join(f"é{n}" if n != 33 else "" for n in range(40)))
    blocks = [block for piece in formats.plan_matrix(*map(str, addresses)).slices for block in piece.read(3)]
    assert [bad.uri for block in blocks for bad in block.bad] == ["a.npy#33"]


def test_npy_with_keys_and_with_ids(job, tmp_path, vectors_ND):
    np.save(tmp_path / "video.npy", vectors_ND.astype(np.float16))
    np.save(tmp_path / "keys.npy", np.arange(100, 140))
    (tmp_path / "ids.txt").write_text("".join(f"clip {n}\r\n" for n in range(40)))
    job(tmp_path / "video.npy", "--keys", tmp_path / "keys.npy", "--dtype", "float16")
    np.testing.assert_array_equal(stored(tmp_path / "features", range(100, 140)), vectors_ND.astype(np.float16))
    assert uris(tmp_path / "features")[101] == "key:101"
    other = tmp_path / "other"
    job(tmp_path / "video.npy", "--keys", tmp_path / "ids.txt", "--dtype", "float16", "--num-shards", 2, store=other)
    keys = [key_of_uri(f"clip {n}") for n in range(40)]
    np.testing.assert_array_equal(stored(other, keys), vectors_ND.astype(np.float16))
    assert FeatureStore.open(other).info.num_shards == 2


def test_xdl_files(job, tmp_path, vectors_ND):
    keys = np.random.default_rng(1).integers(-(1 << 62), 1 << 62, 40)
    write_xdl(tmp_path / "xdl", keys, vectors_ND)
    (tmp_path / "xdl/data.1024").write_bytes(b"of somebody else")
    text = job(tmp_path / "xdl", "--dim", DIM, "--dtype", "float32", "--source", "VGG16 fc6 of 2018")
    assert "rows 40 new 40" in text
    np.testing.assert_array_equal(stored(tmp_path / "features", keys.tolist()), vectors_ND)
    extractor = FeatureStore.open(tmp_path / "features").info.extractor
    assert (extractor.layer, extractor.weights_digest) == ("VGG16 fc6 of 2018", "unknown")


def test_bad_records_of_xdl(job, tmp_path, vectors_ND):
    write_xdl(tmp_path / "xdl", range(40), vectors_ND)
    text = job(tmp_path / "xdl", "--dim", DIM + 1, code=1)
    torn = {"count": 40, "files": 40, "where": "data.0", "record_bytes": 36, "dim": 7}
    assert re.search(told(Problem.TORN_FILES, **torn), text)
    assert not (tmp_path / "features").exists()  # its width would be for ever
    write_xdl(tmp_path / "xdl", [2048 + 3], vectors_ND[:1], number_of=lambda key: 4)
    text = job(tmp_path / "xdl", "--dim", DIM)
    assert "rows 41 new 40" in text
    assert "1 key in the wrong file (key:2051)" in text
    assert FeatureStore.open(tmp_path / "features").snapshot().keys().tolist() == list(range(40))
    with (tmp_path / "xdl/data.7").open("ab") as file:
        file.write(np.int64(7 + 1024).tobytes() + bytes(9))
    text = job(tmp_path / "xdl", "--dim", DIM, code=1)
    torn |= {"count": 1, "where": "data.7", "record_bytes": 32, "dim": 6}
    assert re.search(told(Problem.TORN_FILES, **torn), text)


def test_a_key_with_a_bad_row_stays_in_the_store_and_in_quarantine(job, tmp_path):
    store = tmp_path / "features"
    pq.write_table(pa.table({"key": [1, 2, 3], "feature": [[1.0], [2.0], [3.0]]}), tmp_path / "first.parquet")
    job(tmp_path / "first.parquet")
    rows = {"key": [1, 2, 2, 3], "feature": [[float("nan")], [5.0], [float("nan")], [3.0]]}
    pq.write_table(pa.table(rows), tmp_path / "next.parquet")
    for _ in range(2):
        assert "quarantined 2" in job(tmp_path / "next.parquet")
        assert stored(store, [1, 2, 3]).tolist() == [[1], [5], [3]]
        assert [row.key for row in FeatureStore.open(store).quarantine_rows()] == [1, 2]


def test_running_again_changes_what_has_changed(job, matrix, tmp_path, vectors_ND):
    path = tmp_path / "features"
    write_xdl(tmp_path / "xdl", range(40), vectors_ND)
    job(tmp_path / "xdl", "--dim", DIM, "--dtype", "float32")
    assert "unchanged 40" in job(tmp_path / "xdl", "--dim", DIM)
    assert FeatureStore.open(path).snapshot().version == 1

    vectors_ND[5] += 1
    vectors_ND[39] += 1
    text = job(*matrix(np.concatenate([vectors_ND[3:], vectors_ND[:1]]), [*range(3, 40), 77]))
    assert "rows 38 new 1 changed 2 unchanged 35 duplicates 0" in text
    snapshot = FeatureStore.open(path).snapshot()
    assert snapshot.version == 2
    assert sum(file.rows for files in snapshot.manifest.shards.values() for file in files[1:]) <= 3
    np.testing.assert_array_equal(stored(path, [*range(40), 77])[:40], vectors_ND)


def test_a_key_with_two_vectors_is_refused(job, matrix, tmp_path, vectors_ND):
    path = tmp_path / "features"
    write_xdl(tmp_path / "xdl", range(10), vectors_ND[:10])
    job(tmp_path / "xdl", "--dim", DIM, "--dtype", "float32")
    # 3 comes as it is and changed, 50 twice and differently, 51 twice and equal; the two of a key in different units.
    next_ND = vectors_ND[[3, 20, 21, 22, 23, 24, 21, 25]]
    text = job(*matrix(next_ND, [3, 50, 51, 52, 3, 50, 51, 53]), "--part-size", 4, code=1)
    assert re.search(told(Problem.CONTESTED_KEYS, count=2, where=3), text)
    assert FeatureStore.open(path).snapshot().version == 1
    text = job(*matrix(next_ND, [3, 50, 51, 52, 54, 55, 51, 53]), "--part-size", 4)
    assert "rows 8 new 6 changed 0 unchanged 1 duplicates 1" in text
    np.testing.assert_array_equal(stored(path, [3, 51, 52, 53]), vectors_ND[[3, 21, 22, 25]])


def test_a_run_that_failed_goes_on_where_it_was(job, matrix, tmp_path, vectors_ND, monkeypatch):
    arguments = (*matrix(vectors_ND, range(40)), "--part-size", 10, "--dtype", "float32")
    monkeypatch.setattr("pipeline.formats.block_rows", lambda dim: 10)
    read = []
    whole = import_vectors.read_slices
    monkeypatch.setattr(import_vectors, "read_slices", lambda some, rows: (read.append(rows), whole(some, rows))[1])
    with monkeypatch.context() as broken:
        broken.setattr(FeatureStore, "commit", Mock(side_effect=OSError("disk full")))
        with pytest.raises(AssertionError):
            job(*arguments)
    assert len(read) == 4
    text = job(*arguments)
    assert len(read) == 4
    assert "resumed 40" in text
    np.testing.assert_array_equal(stored(tmp_path / "features", range(40)), vectors_ND)
    assert not list((tmp_path / "features/staging").glob("*/*"))


def test_other_vectors_are_refused(job, matrix, tmp_path, vectors_ND):
    write_xdl(tmp_path / "xdl", range(10), vectors_ND[:10])
    xdl = (tmp_path / "xdl", "--dim", DIM, "--source")
    job(*xdl, "first")
    assert "extractor.layer is 'first' instead of 'second'" in job(*xdl, "second", code=1)
    assert "dim is 6 instead of 9" in job(*matrix(np.ones((2, 9), np.float32), [1, 2]), code=1)
    text = pa.table({"id": ["a", "b"], "uri": ["x", "y"], "feature": [[1.0] * DIM] * 2})
    pq.write_table(text, tmp_path / "a.parquet")
    job(tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": ["a"], "feature": [[2.0] * DIM]}), tmp_path / "b.parquet")
    two = told(StoreProblem.KEY_OF_TWO_URIS, first="x", second="a")
    assert re.search(two, job(tmp_path / "b.parquet", code=1))


def test_a_compact_store_takes_imports_of_full_vectors(job, matrix, tmp_path, vectors_ND):
    job(*matrix(vectors_ND, range(40)), "--dtype", "float32")
    remake(FeatureStore.open(tmp_path / "features"), small := tmp_path / "small", dims=3)
    text = job(*matrix(vectors_ND, range(40)), store=small)
    assert "unchanged 40" in text, "digests are those of the full vectors"
    vectors_ND[0], vectors_ND[1, 0] = vectors_ND[30], np.nan
    text = job(*matrix(vectors_ND, range(40)), store=small)
    assert "changed 1 unchanged 38" in text and "1 not finite in float32 (key:1)" in text
    np.testing.assert_allclose(stored(small, [0]), stored(small, [30]), rtol=1e-6)
    narrow = job(*matrix(vectors_ND[:, :3], range(40)), store=small, code=1)
    assert re.search(told(Problem.WRONG_WIDTH, where=small, wanted=DIM, value=3), narrow)


def test_mistakes_are_one_message(job, tmp_path, vectors_ND):
    np.save(tmp_path / "a.npy", vectors_ND)
    np.save(tmp_path / "short.npy", range(39))
    np.save(tmp_path / "text.npy", np.array(["a", "b"]))
    np.save(tmp_path / "columns.npy", np.asfortranarray(vectors_ND))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-8])
    (tmp_path / "none.npy").write_bytes(b"no array")
    pq.write_table(pa.table({"name": ["a"]}), tmp_path / "nokey.parquet")
    pq.write_table(pa.table({"key": [1], "a": [[1.0]], "b": [[1.0]]}), tmp_path / "two.parquet")
    pq.write_table(pa.table({"key": ["1"], "a": [[1.0]]}), tmp_path / "text.parquet")
    pq.write_table(pa.table({"key": [1], "a": pa.array([b"1234"], pa.binary(4))}), tmp_path / "bits.parquet")
    pq.write_table(pa.table({"key": [1], "a": [[float("nan")]]}), tmp_path / "nan.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and nothing more")
    for name in ("empty", "other", "hollow"):
        (tmp_path / name).mkdir()
    (tmp_path / "other/notes.txt").write_text("no vectors")
    (tmp_path / "hollow/data.3").write_bytes(b"")
    write_xdl(tmp_path / "xdl", [0], vectors_ND[:1])
    short, text, none = (tmp_path / f"{name}.npy" for name in ("short", "text", "none"))
    keys = ("--keys", short)
    for name, args, problem, values in [
        ("nowhere", (), Problem.NOTHING_THERE, {}),
        ("empty", (), Problem.NOTHING_THERE, {}),
        ("other", (), Problem.NO_FILES_ENDING, {"value": ".parquet"}),
        ("hollow", (), Problem.ONLY_EMPTY_FILES, {}),
        ("xdl", ("--dim", 100), Problem.TORN_FILES, {"count": 1, "files": 1, "where": "data.0", "record_bytes": 408}),
        ("a.npy", keys, Problem.WRONG_NUMBER_OF_KEYS, {"where": short, "value": 39, "wanted": 40}),
        ("a.npy", ("--keys", text), Problem.NOT_INT64_KEYS, {"where": text, "dtype": "<U1", "shape": "(2,)"}),
        ("a.npy", ("--keys", none), Problem.UNREADABLE_AS, {"where": none, "form": ".npy"}),
        ("short.npy", keys, Problem.NOT_A_MATRIX, {"dtype": "int64", "shape": "(39,)"}),
        ("columns.npy", keys, Problem.COLUMN_BY_COLUMN, {}),
        ("cut.npy", keys, Problem.TRUNCATED, {"value": 1080, "wanted": 1088}),
        ("none.npy", keys, Problem.UNREADABLE_AS, {"form": ".npy"}),
        ("nokey.parquet", (), Problem.NO_KEY_COLUMN, {"where": "nokey.parquet", "value": "name"}),
        ("two.parquet", (), Problem.WHICH_FEATURE, {"where": "two.parquet", "columns": ["a", "b"]}),
        ("two.parquet", ("--feature-column", "c"), Problem.NO_VECTORS, {"where": "two.parquet", "value": "c"}),
        ("text.parquet", (), Problem.WRONG_KEY_TYPE, {"where": "text.parquet", "column": "key", "value": "string"}),
        ("bits.parquet", (), Problem.WHICH_FEATURE, {"where": "bits.parquet", "columns": ["key", "a"]}),
        ("bits.parquet", ("--feature-column", "a"), Problem.NO_VECTORS, {"where": "bits.parquet", "value": "a"}),
        ("nan.parquet", (), Problem.NO_USABLE_ROW, {"count": 1, "reasons": "1 not finite in bfloat16 (key:1)"}),
        ("torn.parquet", (), Problem.UNREADABLE_AS, {"form": "Parquet"}),
    ]:
        code = 2 if problem in (Problem.NOTHING_THERE, Problem.NO_FILES_ENDING) else 1
        message = told(problem, **{"where": tmp_path / name} | values)
        assert re.search(f"error: {message}", job(tmp_path / name, *args, code=code)), name


def test_from_s3_into_s3(job, tmp_path, vectors_ND, s3_url):
    write_xdl(tmp_path / "xdl", range(40), vectors_ND)
    for path in (tmp_path / "xdl").iterdir():
        Storage(f"{s3_url}/xdl").write_bytes(path.name, path.read_bytes())
    job(f"{s3_url}/xdl", "--dim", DIM, "--dtype", "float32", "--num-shards", 2, store=f"{s3_url}/features")
    np.testing.assert_array_equal(stored(f"{s3_url}/features", range(40)), vectors_ND)
    pq.write_table(pa.table({"key": [3], "feature": [[0.0] * DIM]}), tmp_path / "a.parquet")
    Storage(f"{s3_url}/more").write_bytes("a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert "changed 1" in job(f"{s3_url}/more/a.parquet", store=f"{s3_url}/features")


def test_a_store_made_anew_at_the_same_address_is_indexed_anew(tmp_path):
    info = StoreInfo(num_shards=1, dim=1, dtype="float32", extractor=extractor_of("elsewhere"))
    for keys in ([1], [2, 3, 4]):
        store = FeatureStore.create(tmp_path / "features", info)
        store.put(FeatureRows.of([str(key) for key in keys], np.ones((len(keys), 1), np.float32), keys=keys))
        assert import_vectors.stored_index(SnapshotId.of(store.snapshot(1)))["key"].tolist() == keys
        shutil.rmtree(tmp_path / "features")


MB = 1 << 20


@pytest.fixture
def store(tmp_path):
    return FeatureStore.create(tmp_path / "features", StoreInfo(num_shards=64, dim=2, extractor=extractor_of("x")))


def cluster(*workers):
    """A client of workers with (threads, MB of memory)."""
    found = {str(place): {"nthreads": threads, "memory_limit": mb * MB} for place, (threads, mb) in enumerate(workers)}
    return SimpleNamespace(
        nthreads=lambda: {place: worker["nthreads"] for place, worker in found.items()},
        scheduler_info=lambda n_workers: {"workers": found},
    )


@pytest.mark.parametrize(
    ("workers", "num_tasks"),
    [
        ([(1, 16_384)], 3),  # of 512 MB
        ([(1, 0)], 3),  # no limit is set
        ([(4, 16_384), (4, 16_384)], 8),  # one for each thread
        ([(2, 16_384), (2, 1024)], 9),  # of 128 MB, a quarter of half of the smaller worker
        ([(1, 16)], 64),  # never less than a shard
    ],
)
def test_tasks_that_build_shards_are_few_and_fit_into_memory(store, monkeypatch, workers, num_tasks):
    calls = []
    large = faulty(store, entries=lambda entries, path: [SimpleNamespace(size_bytes=512 * MB)] * 2)
    monkeypatch.setattr(store_run, "run_all", lambda client, title, function, given, advice: calls.extend(given) or [])
    assert build_shards(cluster(*workers), large, "run", ["part"]) == {}
    assert len(calls) == num_tasks
    assert [shard for _, _, shards, _ in calls for shard in shards] == list(range(64))


def test_a_run_whose_parts_another_one_discarded_says_what_to_do(client, store):
    with raises(InvalidRowsError, StoreProblem.NEVER_STAGED, where=re.compile("/staging/run/part")):
        build_shards(client, store, "run", ["part"])
