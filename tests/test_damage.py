"""Damage: of a file that is cut, changed, empty or gone an error names it; a copy in a cache is made anew.

KINDS is the table of what is kept: stores, samples, runs, indexes of ads and published models, and logs that samples
are made of. A test says that it is complete.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore import FeaturePartition, FeatureRows, FeatureStore, QuarantineRow
from featurestore.errors import CorruptFileError, UserError
from featurestore.format.codec import Basis, BasisOrigin, write_basis
from featurestore.log import manifest_path
from featurestore.problems import Problem
from featurestore.storage.storage import Storage
from featurestore.upkeep.expiry import expire
from featurestore.upkeep.history import pin
from featurestore.upkeep.verify import verify
from pipeline.options import SampleOptions
from pipeline.samples.build import build_samples
from serving.bundle.open import Bundle
from tests.featurestore.conftest import INFO
from tests.pipeline.samples.rows import done, read, shown, table, write
from tests.raised import raises
from tests.serving.bundle.conftest import export
from tests.serving.scoring.variants import exported, shared_places, trained
from tests.trainer.conftest import sample_table
from tests.trainer.samples.reading import hashed, reader_of, rows_of
from trainer.comm import SoloComm
from trainer.prerank.adindex import AdIndex, IndexOrigin
from trainer.runs.saved import open_trained
from trainer.samples.survey import IdDictionary

if TYPE_CHECKING:
    from distributed import Client

pytestmark = pytest.mark.long

DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "truncated": lambda data: data[:-10],
    "halved": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"x",
    "zeros": lambda data: bytes(len(data)),
    "gone": lambda data: None,
}


def words(error: UserError) -> str:
    return f"error: {type(error).__name__} {getattr(error.problem, 'name', '')}: {error}"


def read_store(world: Path) -> str:
    """The store's own check of itself, which finds all at once."""
    problems = verify(FeatureStore.open(world / "store"), threads=1).problems
    assert all(problem.way_out for problem in problems)
    return "\n".join(words(problem.error) for problem in problems)


def read_rows(world: Path) -> str:
    """The rows as training looks them up."""
    with FeaturePartition.load(world / "store", cache_dir=world / "cache") as partition:
        found = partition.lookup(FeatureStore.open(world / "store").snapshot().keys())
    return found.features_UD.tobytes().hex()


def read_shard(world: Path) -> str:
    """The rows of a shard, without a look at the digests of its files."""
    return str(FeatureStore.open(world / "store").snapshot().shard_reader(1).read().to_pylist())


def read_samples(world: Path) -> str:
    return str([rows_of(batch) for batch in reader_of(world / "samples").batches()])


def read_run(world: Path) -> str:
    with closing(open_trained(world / "run", SoloComm())) as run:
        state = run.engine.dense_state() | run.engine.shard_state()
    return str({name: value.numpy().tobytes() for name, value in state.items()})


def read_names(world: Path) -> str:
    """The texts of hashed IDs."""
    return str(IdDictionary(world / "run" / "ids.parquet").texts(hashed(f"shop ü{number}") for number in range(9)))


def read_ads(world: Path) -> str:
    ads = AdIndex.open(str(world / "ads"))
    return str((ads.vectors(), ads.index.search(np.eye(3, dtype=np.float32), 2)))


def read_model(world: Path) -> str:
    """The version in use, with all its files, by a scorer that starts for the first time."""
    shutil.rmtree(world / "cache" / "model", ignore_errors=True)
    with closing(Bundle.open(str(world / "model"), cache_dir=world / "cache" / "model")) as bundle:
        return str([bundle.files.path(file.name).read_bytes() for file in bundle.manifest.files])


@dataclass(frozen=True)
class Kind:
    """Files of one kind: their pattern below the world, who reads them, and the error, with its problems, that tells.

    `silent`: damage of which nothing can tell: nothing else names a file, and settings are text that people change.
    `bits`: whether each flipped bit is told; else what is read may be the same. `places`: how many are flipped."""

    files: str
    read: Callable[[Path], str]
    error: str
    problems: str
    silent: tuple[str, ...] = ()
    bits: bool = True
    places: int = 8


CORRUPT, BROKEN, GONE, TEXT = "CorruptFileError", "BrokenBundleError", ("gone",), ("halved", "bit")
JSON, DIGEST = "DAMAGED|WRONG_DIGEST|FIELD_MISSING", "OTHER_SIZE|WRONG_NUMBER|DIGEST_DIFFERS"
PARQUET = "WRONG_NUMBER|DAMAGED|WRONG_COLUMNS|NOT_PARQUET|SAMPLES_DAMAGED|DICTIONARY_DAMAGED"
MIXED, CHECKPOINT = f"{JSON}|{DIGEST}", "CHECKPOINT_FILE_CHANGED|CHECKPOINT_FILE_BAD"
KINDS = {
    "store.json": Kind("store/store.json", read_store, CORRUPT, JSON),
    "manifest": Kind("store/log/*.json", read_store, CORRUPT, JSON, GONE),
    "data": Kind("store/data/*/*.parquet", read_store, CORRUPT, DIGEST),
    "statistics": Kind("store/data/*/*.stats.npy", read_store, CORRUPT, DIGEST),
    "quarantine": Kind("store/quarantine/*.parquet", read_store, CORRUPT, "NAME_IS_NOT_DIGEST", GONE),
    "pin": Kind("store/pins/*.json", read_store, CORRUPT, JSON, GONE),
    "expired manifest": Kind("store/expired/*.json", read_store, CORRUPT, JSON, GONE),
    "basis": Kind("store/basis/*.safetensors", read_store, CORRUPT, DIGEST),
    "rows": Kind("store/data/0001/*.parquet", read_shard, CORRUPT, PARQUET, bits=False, places=60),
    "samples": Kind("samples/train/*.parquet", read_samples, "DataError", PARQUET, GONE, bits=False, places=60),
    "config": Kind("run/config.yaml", read_run, "ConfigError", "SETTINGS_NOT_YAML|SETTINGS_NOT_A_MAPPING", TEXT),
    "checkpoint's version": Kind("run/checkpoints/versions/*2.json", read_run, CORRUPT, JSON),
    "checkpoint": Kind("run/checkpoints/files/*", read_run, "DamagedCheckpointError", CHECKPOINT),
    "names of ids": Kind("run/ids.parquet", read_names, "DataError", PARQUET, bits=False, places=400),
    "ads' version": Kind("ads/versions/*.json", read_ads, CORRUPT, JSON),
    "ads": Kind("ads/files/*", read_ads, CORRUPT, MIXED),
    "model's version": Kind("model/log/*.json", read_model, BROKEN, JSON, places=60),
    "model's choice": Kind("model/use/*.json", read_model, BROKEN, JSON, places=60),
    "model": Kind("model/bundles/*/*.*", read_model, BROKEN, DIGEST),
    "model's vectors": Kind("model/bundles/*/vectors/images/**/*.[jp]*", read_model, BROKEN, MIXED),
}
CACHES = {kind: f"cache/shard-*.{kind}" for kind in ("rows.bin", "keys.npy", "json")}
UNREAD = ("run/report.json", "run/tensorboard/*", "run/checkpoints/versions/*1.json", "model/**/vectors/**/*.npy")
"""Figures for people, a version that another replaced, and statistics of vectors, which only a new export asks for."""


def write_store(folder: Path) -> None:
    """Two shards of a compact store: a base and deltas, tombstones, and each other kind of file."""
    values_ND = np.random.default_rng(0).standard_normal((160, 4)).astype(np.float32)
    of = {"store_id": "", "version": 1, "commit_id": "", "num_rows": 160, "total_variance": 6.0}
    origin = BasisOrigin(extractor=INFO.extractor, **of)
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


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each. Tests put back what they change."""
    world = tmp_path_factory.mktemp("damage")
    write_store(world / "store")
    (world / "samples" / "train").mkdir(parents=True)
    as_built = {"row_group_size": 20, "compression": "zstd", "write_page_checksum": True}
    pq.write_table(sample_table(60), world / "samples" / "train" / "day=2026-01-01.parquet", **as_built)
    places = shared_places(tmp_path_factory)
    shutil.copytree(trained(places, "inputs"), world / "run")
    shutil.copytree(exported(places, "exact", "bundles", export).url, world / "model")
    origin = IndexOrigin(run="a", checkpoint="step-1", checkpoint_digest="d1", key_column="ad_item", bias=0.5)
    AdIndex.build(str(world / "ads"), "flat", np.arange(3), np.eye(3, dtype=np.float32), origin)
    assert not any(outcome(kind, world).startswith("error: ") for kind in KINDS.values())
    return world


def files_of(world: Path, pattern: str) -> list[Path]:
    found = sorted(path for path in world.glob(pattern) if path.is_file())
    assert found, pattern
    return found


def test_the_table_is_complete(world: Path) -> None:
    patterns = [*(kind.files for kind in KINDS.values()), *CACHES.values(), *UNREAD, "cache/model/**/*"]
    known = {path for pattern in patterns for path in world.glob(pattern)}
    assert [path for path in world.rglob("*") if path.is_file() and path not in known] == []


def damaged(path: Path, every: int | None = None, places: int = 8) -> Iterator[str]:
    """Damage a file in every way, then a bit at a time, at so many places or `every` so many bytes; then mend it."""
    whole = path.read_bytes()
    try:
        for how, change in DAMAGES.items():
            data = change(whole)
            path.write_bytes(data) if data is not None else path.unlink()
            yield how
        for turn, place in enumerate([*range(0, len(whole), every or max(1, len(whole) // places)), len(whole) - 1]):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << turn % 8]) + whole[place + 1 :])
            yield f"bit of byte {place}"
    finally:
        path.write_bytes(whole)


def outcome(kind: Kind, world: Path) -> str:
    """What is read, or the errors."""
    try:
        return kind.read(world)
    except UserError as error:
        return words(error)


def is_told(kind: Kind, world: Path, path: Path, told: str) -> bool:
    """Whether an error of the kind names the file, by its path or by its name in a checkpoint; of one that is gone,
    whether one names its place and, unless its name is a number or a day, the file."""
    of_checkpoint = re.fullmatch(r"(step-\d+)-(.+)-[0-9a-f]{32}(\..+)", path.name)
    name = of_checkpoint.expand(r"/\1/\2\3") if of_checkpoint else str(path)
    if path.exists():
        return bool(re.search(f"^error: {kind.error} ({kind.problems}): .*{re.escape(name)}", told, re.MULTILINE))
    file = "" if re.fullmatch(r"(day=)?\d+", path.stem) else Path(name).name
    return told.startswith("error: ") and str(world / path.relative_to(world).parts[0]) in told and file in told


SLOW = [pytest.mark.slow, pytest.mark.timeout(1200)]
CLOSELY = [pytest.param(name, 3, marks=SLOW) for name, kind in KINDS.items() if kind.read is read_store]


@pytest.mark.parametrize(("kind", "every"), [*((kind, None) for kind in KINDS), *CLOSELY])
def test_an_error_names_the_file(world: Path, kind: str, every: int | None) -> None:
    row = KINDS[kind]
    sound = row.read(world)
    for path in files_of(world, row.files):
        for how in damaged(path, every, row.places):
            told = outcome(row, world)
            is_same = told == sound and how.startswith("bit") and not row.bits
            assert is_same or how.startswith(row.silent) or is_told(row, world, path, told), (how, path, told[:400])
    assert row.read(world) == sound


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_is_made_anew(world: Path, kind: str) -> None:
    """Rows of the right size are looked at after a restart of the machine: see test_partition.py."""
    sound = read_rows(world)
    for path in files_of(world, CACHES[kind]):
        whole = path.read_bytes()
        for how in damaged(path):
            if kind != "rows.bin" or not how.startswith(("zeros", "bit")):
                assert read_rows(world) == sound, f"{how}: {path}"
                # The seal says which file of rows was checked: where those were built again that is another one.
                assert path.read_bytes() == whole or kind == "json", f"{how}: {path}"


@pytest.mark.parametrize("step", [251, pytest.param(3, marks=pytest.mark.slow)])
def test_a_partition_names_it_and_leaves_nothing_half_made(world: Path, tmp_path: Path, step: int) -> None:
    store, cache = FeatureStore.open(world / "store"), tmp_path / "cache"
    manifest = store.snapshot().manifest
    entries = [(shard, Path(store.url) / entry.path) for shard, files in manifest.shards.items() for entry in files]
    others = [(0, Path(store.url) / name) for name in (manifest_path(manifest.version), "store.json")]
    for shard, path in (*entries, *others):
        for how in damaged(path, step):
            if how != "gone":
                with pytest.raises(CorruptFileError) as caught:
                    FeaturePartition.load(store.url, shard, 2, cache)
                    pytest.fail(f"{how}: {path}")
                assert caught.value.values["where"] == str(path), how
    assert not list(cache.iterdir())


def test_a_footer_whose_row_groups_do_not_add_up_is_damaged(world: Path) -> None:
    """Arrow reads as many rows as the row group says, whatever the file's own number is."""
    snapshot = FeatureStore.open(world / "store").snapshot()
    path = world / "store" / snapshot.manifest.files(0)[0].path
    num_rows, footer = pq.read_metadata(path).num_rows, len(whole := path.read_bytes()) - 8
    for place in range(footer - int.from_bytes(whole[-8:-4], "little"), footer):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
        try:
            metadata = pq.read_metadata(path)
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            continue
        if metadata.row_group(0).num_rows != num_rows == metadata.num_rows:
            break  # the next places are those of the same number
    with raises(CorruptFileError, Problem.WRONG_ROW_GROUPS, where=path, wanted=num_rows):
        snapshot.shard_reader(0).keys()
    path.write_bytes(whole)


def test_a_log_is_named_and_no_samples_are_made_of_it(client: "Client", tmp_path: Path) -> None:
    path, samples = tmp_path / "logs" / "behaviors" / "day=00.parquet", tmp_path / "samples"
    write(tmp_path / "logs", [[shown(2_000)]], [[done(0)]])
    behaviors = table([done(at_s) for at_s in range(1_000)])
    pq.write_table(behaviors, path, write_page_checksum=True, compression="none")

    def build(world: Path) -> str:
        build_samples(SampleOptions(logs=str(world / "logs"), samples=str(samples), test_days=0), client)
        rows = str(read(samples))
        shutil.rmtree(samples)
        return rows

    logs = Kind("", build, "SampleError", "REFUSED|UNREADABLE_AS")
    sound = build(tmp_path)
    for how in damaged(path):
        told = outcome(logs, tmp_path)
        assert is_told(logs, tmp_path, path, told) or (told == sound and how.startswith("bit")), f"{how}: {told[:400]}"
        assert not samples.exists()
