"""Data files: docs/FORMAT.md is enough to read them."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash

from featurestore import FeatureRows, FeatureStore, StoreInfo, to_bits, to_float32
from tests.featurestore.contents import metadata_of

MASK = (1 << 64) - 1


def hash_of(key: int) -> int:
    z = (key + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def unsealed(path: Path) -> dict[str, Any]:
    text = path.read_text("ascii")
    body = text[: text.rindex(',\n "digest"')] + "\n}"
    fields: dict[str, Any] = json.loads(text)
    assert list(fields)[-1] == "digest" and fields.pop("digest") == hashlib.sha256(body.encode()).hexdigest()
    assert fields["format_version"] == 1
    return fields


def numbers(data: bytes, dtype: str) -> list[float]:
    if dtype == "bfloat16":
        halves = struct.unpack(f"<{len(data) // 2}H", data)
        data = struct.pack(f"<{len(halves)}I", *(half << 16 for half in halves))
    form = {"bfloat16": "<f", "float16": "<e", "float32": "<f"}[dtype]
    return [number for (number,) in struct.iter_unpack(form, data)]


def read_store(folder: Path) -> dict[int, tuple[str, list[float]]]:
    """Uri and feature of every live key, newest snapshot."""
    store = unsealed(folder / "store.json")
    newest = max((folder / "log").glob("*.json"))
    manifest = unsealed(newest)
    assert manifest["version"] == int(newest.stem)
    rows = {}
    for shard, files in manifest["shards"].items():
        decided: set[int] = set()
        for file in reversed(files):
            data = (folder / file["path"]).read_bytes()
            assert len(data) == file["bytes"] and hashlib.sha256(data).hexdigest() == file["sha256"]
            assert xxhash.xxh3_128(data).hexdigest() == file["xxh3_128"]
            table = pq.read_table(folder / file["path"], page_checksum_verification=True).to_pylist()
            hashes = [hash_of(row["key"]) for row in table]
            assert hashes == sorted(set(hashes)) and len(table) == file["rows"]
            bits = store["num_shards"].bit_length() - 1
            assert {h >> (64 - bits) for h in hashes} <= {int(shard)}
            assert sum(row["deleted"] for row in table) == file["num_deleted"]
            for row in table:
                if row["key"] not in decided and not row["deleted"]:
                    assert row["key"] & MASK == xxhash.xxh3_64(row["uri"].encode(), seed=0).intdigest()
                    rows[row["key"]] = (row["uri"], numbers(row["feature"], store["dtype"]))
                decided.add(row["key"])
    return rows


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_reader_written_from_the_page_reads_what_ours_reads(tmp_path: Path, info: StoreInfo, dtype: str) -> None:
    info = info.model_copy(update={"dtype": dtype})
    store = FeatureStore.create(tmp_path / "store", info)
    rng = np.random.default_rng(0)
    for first, last in ((0, 200), (150, 260)):  # some rows twice
        values = rng.standard_normal((last - first, info.dim), dtype=np.float32)
        uris = [f"images/{i}-ä.jpg" for i in range(first, last)]
        snapshot = store.put(FeatureRows.of(uris, to_bits(values, info.dtype)))
    keys = snapshot.keys()
    snapshot = store.delete(keys[::9])
    found = read_store(tmp_path / "store")
    ours = dict(zip(metadata_of(snapshot)["key"].to_pylist(), metadata_of(snapshot)["uri"].to_pylist(), strict=True))
    assert {key: uri for key, (uri, _) in found.items()} == ours
    assert len(ours) == 260 - len(keys[::9])
    features_UD = to_float32(snapshot.get(list(ours)), info.dtype)
    assert np.array_equal(features_UD, np.array([found[key][1] for key in ours], np.float32))


def test_the_table_of_hashes() -> None:
    page = Path(__file__).parents[3] / "docs" / "FORMAT.md"
    for key in (0, 1, -1):
        value = hash_of(key)
        assert f"| {key} | `{value:016x}` | {value >> 58} |" in page.read_text()
