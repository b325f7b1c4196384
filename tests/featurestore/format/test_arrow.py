"""Live rows as Arrow tables: the numbers that the codec decodes, the columns asked for, and no row twice."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from featurestore import Codec, FeatureRows, FeatureStore, StoreInfo, keys_of_uris
from featurestore.format.codec import write_codec
from featurestore.storage.storage import Storage
from tests.featurestore.conftest import MakeRows


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8"])
def test_decoded_and_as_stored(dtype: str, info: StoreInfo, tmp_path: Path) -> None:
    """Against `get`, after a key was replaced and another removed."""
    info = info.model_copy(update={"dtype": dtype})
    if dtype == "int8":
        codec = Codec("int8", np.stack([np.full(8, -3), np.full(8, 6)]).astype(np.float32))
        info = info.model_copy(update={"codec": write_codec(Storage(tmp_path / "store"), codec)})
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
