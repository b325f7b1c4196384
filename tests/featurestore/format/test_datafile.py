"""Data files: docs/FORMAT.md is enough to read them, and damage of any kind is found and never served."""

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from featurestore import FeaturePartition, FeatureRows, FeatureStore, QuarantineRow, StoreInfo, to_bits, to_float32
from featurestore.errors import CorruptFileError
from featurestore.format.codec import Basis, BasisOrigin, write_basis
from featurestore.log import manifest_path
from featurestore.problems import Problem
from featurestore.storage.storage import Storage
from featurestore.upkeep.expiry import expire
from featurestore.upkeep.history import pin
from featurestore.upkeep.verify import verify
from tests.featurestore.conftest import INFO
from tests.featurestore.contents import metadata_of
from tests.raised import raises

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


KINDS = {
    "store.json": "store.json",
    "manifest": "log/*.json",
    "data": "data/*/*.parquet",
    "statistics": "data/*/*.stats.npy",
    "quarantine": "quarantine/*.parquet",
    "pin": "pins/*.json",
    "expired manifest": "expired/*.json",
    "basis": "basis/*.safetensors",
}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Two shards of a compact store: a base and deltas, tombstones, and each other kind of file.

    Tests put back what they change."""
    folder = tmp_path_factory.mktemp("corruption") / "store"
    values_ND = np.random.default_rng(0).standard_normal((160, 4)).astype(np.float32)
    origin = BasisOrigin(
        store_id="", version=1, commit_id="", extractor=INFO.extractor, num_rows=160, total_variance=6.0
    )
    spec = write_basis(Storage(folder), Basis(np.zeros(6), np.eye(4, 6), np.ones(4), origin))
    update = {"dim": 4, "num_shards": 2, "dtype": "float16", "reduction": spec}
    store = FeatureStore.create(folder, INFO.model_copy(update=update))
    rows = FeatureRows.of([f"{i}.jpg" for i in range(160)], values_ND.astype(np.float16))
    for seed in range(3):
        store.put(rows.take(np.arange(40 * seed, 160)))
    store.delete(rows.keys_N[:30])
    store.add_quarantine([QuarantineRow(1, "bad.jpg", "not an image", 1.0)])
    pin(store, "best", 3)
    expire(store, keep_last=2, keep_days=0, grace_days=1)
    assert all(list(folder.glob(pattern)) for pattern in KINDS.values())
    assert verify(store).problems == []
    return store


def flips(path: Path, step: int) -> Iterator[int]:
    """Flip one bit after the other, and put the file back at the end."""
    whole = path.read_bytes()
    damaged = bytearray(whole)
    try:
        for turn, place in enumerate(range(0, len(whole), step)):
            damaged[place] ^= 1 << (turn % 8)
            path.write_bytes(damaged)
            yield place
            damaged[place] = whole[place]
    finally:
        path.write_bytes(whole)


def files_of(store: FeatureStore, kind: str) -> list[Path]:
    return sorted(Path(store.url).glob(KINDS[kind]))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [None, pytest.param(3, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_verify_finds_a_flipped_bit_in_every_kind_of_file(full: FeatureStore, kind: str, step: int | None) -> None:
    for path in files_of(full, kind):
        for place in flips(path, step or max(1, path.stat().st_size // 8)):
            found = verify(full, threads=1).problems
            assert any(path.name in str(problem.error) for problem in found), f"byte {place} of {path}"
            assert all(problem.way_out for problem in found)
    assert verify(full).problems == []


@pytest.mark.long
@pytest.mark.parametrize("step", [251, pytest.param(3, marks=pytest.mark.slow)])
def test_a_partition_refuses_every_flipped_bit_of_what_it_uses(full: FeatureStore, tmp_path: Path, step: int) -> None:
    store, cache = full, tmp_path
    manifest = store.snapshot().manifest
    for shard, files in manifest.shards.items():
        for entry in files:
            for place in flips(Path(store.url) / entry.path, step):
                with pytest.raises(CorruptFileError) as caught:
                    FeaturePartition.load(store, shard, 2, cache / "damaged")
                    pytest.fail(f"byte {place} of {entry.path}")
                assert caught.value.values["where"] == store.storage.full(entry.path)
    assert not list((cache / "damaged").iterdir())  # nothing half made
    for path in (Path(store.url) / manifest_path(manifest.version), Path(store.url) / "store.json"):
        for place in flips(path, max(1, step // 4)):
            with pytest.raises(CorruptFileError) as caught:
                FeaturePartition.load(store.url, 0, 2, cache)
                pytest.fail(f"byte {place} of {path}")
            assert caught.value.values["where"] == str(path)


@pytest.mark.long
@pytest.mark.parametrize("step", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_reads_of_single_rows_give_the_right_ones_or_an_error(full: FeatureStore, step: int) -> None:
    """Without the digest of the file: the right rows, or an error."""
    snapshot = full.snapshot()
    whole = snapshot.shard_reader(1).read()
    for place in flips(Path(full.url) / snapshot.manifest.files(1)[0].path, step):
        try:
            found = snapshot.shard_reader(1).read()
        except CorruptFileError:
            continue
        assert found.equals(whole), f"byte {place}"


def test_a_footer_whose_row_groups_do_not_add_up_is_damaged(full: FeatureStore) -> None:
    """Arrow reads as many rows as the row group says, whatever the file's own number is."""
    entry = full.snapshot().manifest.files(0)[0]
    path = Path(full.url) / entry.path
    whole = path.read_bytes()
    num_rows = pq.read_metadata(path).num_rows
    found = 0
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    try:
        for place in range(footer, len(whole) - 8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
            try:
                metadata = pq.read_metadata(path)
                differs = metadata.row_group(0).num_rows != num_rows == metadata.num_rows
            except (pa.ArrowException, OSError, UnicodeDecodeError):
                continue
            if differs:
                found += 1
                with raises(CorruptFileError, Problem.WRONG_ROW_GROUPS, where=path, wanted=num_rows):
                    full.snapshot().shard_reader(0).keys()
                break  # the next places are those of the same number
    finally:
        path.write_bytes(whole)
    assert found


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-10],
    "halved": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"x",
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_cut_empty_longer_and_missing_files_are_found(full: FeatureStore, kind: str) -> None:
    for path in files_of(full, kind):
        whole = path.read_bytes()
        for name, damage in DAMAGES.items():
            path.write_bytes(damage(whole))
            found = verify(full, threads=1).problems
            assert any(path.name in str(problem.error) for problem in found), f"{name}: {path}"
        path.unlink()
        found = verify(full, threads=1).problems
        # What nothing else names is gone without a trace: a deleted pin, and an old manifest, which expires so, too.
        leaves_a_trace = kind in ("store.json", "data", "statistics", "basis")
        assert any(path.name in str(problem.error) for problem in found) or not leaves_a_trace, path
        path.write_bytes(whole)
    assert verify(full).problems == []
