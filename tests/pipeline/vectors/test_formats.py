"""Vectors from elsewhere: every format gives its rows, and bad ones are told apart."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore.format.rows import to_bits
from featurestore.keys import key_of_uri
from featurestore.store import FeatureStore
from pipeline.vectors import formats
from pipeline.vectors.formats import VectorBlock, gathered, pack
from tests.pipeline.vectors.conftest import DIM, stored, uris, write_xdl


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
    monkeypatch.setattr("pipeline.vectors.formats.block_rows", lambda dim: 10)  # so that a file has several slices
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


def test_ids_meet_their_rows_in_every_slice(tmp_path, vectors_ND, monkeypatch):
    from pipeline.vectors import formats

    monkeypatch.setattr(formats, "block_rows", lambda dim: 7)
    np.save(tmp_path / "a.npy", vectors_ND)
    for end in ("", "\n"):
        (tmp_path / "ids").write_text("\n".join(f"é{n}" for n in range(40)) + end)
        source = formats.plan_matrix(str(tmp_path / "a.npy"), str(tmp_path / "ids"))
        blocks = [block for piece in source.slices for block in piece.read(3)]
        assert [uri for block in blocks for uri in block.uris] == [f"é{n}" for n in range(40)]
        np.testing.assert_array_equal(np.concatenate([block.vectors_ND for block in blocks]), vectors_ND)
        assert max(map(len, blocks)) == 3


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
    write_xdl(tmp_path / "xdl", [2048 + 3], vectors_ND[:1], number_of=lambda key: 4)
    text = job(tmp_path / "xdl", "--dim", DIM)
    assert "rows 41 new 40" in text
    assert "1 key in the wrong file (key:2051)" in text
    assert FeatureStore.open(tmp_path / "features").snapshot().keys().tolist() == list(range(40))
    with (tmp_path / "xdl/data.7").open("ab") as file:
        file.write(np.int64(7 + 1024).tobytes() + bytes(9))
    text = job(tmp_path / "xdl", "--dim", DIM, code=1)
    assert "1 of 40 files, data.7 first, are not a number of records of 32 bytes" in text
    assert "is --dim 6 right, and are the files whole?" in text


def test_a_wrong_width_of_xdl_is_refused_not_quarantined(job, tmp_path, vectors_ND):
    write_xdl(tmp_path / "xdl", range(40), vectors_ND)
    text = job(tmp_path / "xdl", "--dim", DIM + 1, code=1)
    assert "40 of 40 files, data.0 first, are not a number of records of 36 bytes" in text
    assert "is --dim 7 right" in text
    write_xdl(tmp_path / "xdl", range(1024, 1064), vectors_ND)  # now two records of 32 bytes look like four of 16
    text = job(tmp_path / "xdl", "--dim", 2, code=1)
    assert "16 of the first 24 keys are in the wrong file" in text
    assert "is --dim 2 right?" in text
    assert not (tmp_path / "features").exists()  # its width would be for ever


def test_slices_are_packed_and_blocks_gathered():
    def block(first, count):
        keys_N = np.arange(first, first + count)
        return VectorBlock(keys_N, [str(key) for key in keys_N], np.zeros((count, 2), np.float32))

    pieces = [formats.XdlSlice("", "", 0, 0, count, 1) for count in (3, 3, 9, 1, 0, 2)]
    assert [[piece.num_rows for piece in unit] for unit in pack(pieces, 6)] == [[3, 3], [9], [1, 0, 2]]
    joined = list(gathered([block(0, 2), block(2, 3), block(5, 1)], 4))
    assert [it.keys_N.tolist() for it in joined] == [[0, 1, 2, 3, 4], [5]]
    assert [len(it) for it in gathered([], 4)] == [0]
