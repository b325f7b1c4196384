"""Recode: a new store with the rows of another in another dtype, made shard by shard and published by one commit.

What is done is noted in `staging/recode` of the new store, so a recode that was killed continues where it stopped.
Letters of shapes: N rows, M live rows of a shard, D feature width.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featurestore import log
from featurestore.commit import Commit
from featurestore.errors import CommitConflictError, InvalidRowsError, StoreExistsError, StoreNotFoundError
from featurestore.format.codec import Codec, write_codec
from featurestore.format.datafile import URI, live_table, matrix_of
from featurestore.format.shard_reader import ShardReader
from featurestore.format.shard_writer import write_shard_file
from featurestore.index import train_ranges
from featurestore.keys import Int64Array
from featurestore.snapshot import Snapshot
from featurestore.spec import SAMPLE_ROWS, DType, FileEntry, ModelT, Sealed, StoreInfo, read_sealed, seal
from featurestore.storage.safety import refuse_unsafe
from featurestore.storage.storage import Storage
from featurestore.storage.threads import Progress, in_threads
from featurestore.store import FeatureStore
from featurestore.upkeep.accuracy import measure_accuracy
from featurestore.upkeep.compaction import merged_blocks

REPORT_PATH = "reports/recode.json"
_STAGING = "staging/recode"
_PLAN_PATH = f"{_STAGING}/plan.json"
_THREADS = 4
_SAMPLED_SHARDS = 64
_COMPARED_ROWS = 5_000
_TRAINING_SEED, _COMPARED_SEED = 0, 1


class RecodeReport(Sealed):
    """Results of a recode, and what it cost in accuracy; `reports/recode.json` of the new store."""

    source: str
    source_version: int
    source_commit_id: str
    source_dtype: DType
    dtype: DType
    num_rows: int
    source_bytes: int
    bytes: int
    sampled_rows: int  # the ranges come from these; 0 where the dtype has none
    clipped_share: float  # of all numbers: further than half a step outside of the ranges
    num_compared: int
    num_queries: int
    relative_error_mean: float | None
    relative_error_p99: float | None
    cosine_mean: float | None
    cosine_min: float | None
    recall_at_10: float | None


class _RecodePlan(Sealed):
    """Plan of a recode: what is made of what; written before the new store, whose codec is trained by then."""

    source: str
    source_version: int
    source_commit_id: str
    sampled_rows: int
    info: StoreInfo

    @property
    def operation(self) -> str:
        return f"recode of snapshot {self.source_version} ({self.source_commit_id})"


class _DoneShard(Sealed):
    """A shard whose file is written; without an entry where it has no live rows."""

    entry: FileEntry | None
    num_clipped: int


def recode(
    source: FeatureStore,
    target_url: str | os.PathLike[str],
    dtype: DType,
    *,
    version: int | None = None,
    sample_rows: int = SAMPLE_ROWS,
    threads: int | None = None,
    progress: Progress | None = None,
) -> RecodeReport:
    """Make a store at `target_url` of the live rows of a snapshot (the newest by default), and measure what it keeps.

    The same call again continues after a kill, with the same snapshot, and gives the report where all is done. Needs
    the memory of a few blocks for each thread, and of `sample_rows` in float32. Raises StoreExistsError where something
    else is at the place, InvalidRowsError where there are no rows to take ranges from or `dtype` cannot hold one,
    CorruptFileError before anything of a damaged file is used.
    """
    storage = Storage(target_url, keep_inside=True)
    plan = _read(storage, _PLAN_PATH, _RecodePlan)
    if plan is None:
        finished = _finished(source, storage, dtype, version)
        if finished is not None:
            return finished
        plan = _make_plan(source, storage, dtype, version, sample_rows)
    snapshot = _planned_snapshot(source, storage, plan, dtype, version)
    target = FeatureStore.open_or_create(storage.url, plan.info)
    done = _recode_shards(snapshot, target, threads or min(_THREADS, len(os.sched_getaffinity(0))), progress)
    target.add_quarantine(source.quarantine_rows())
    published = _publish(target, plan, done)
    report = _report(plan, snapshot, published, sum(shard.num_clipped for shard in done.values()))
    storage.write_bytes(REPORT_PATH, seal(report))
    target.discard_staging("recode")
    return report


def read_report(storage: Storage) -> RecodeReport | None:
    """Read the report of the recode that made the store at this place, if one did. Raises CorruptFileError."""
    return _read(storage, REPORT_PATH, RecodeReport)


def sample(snapshot: Snapshot, num_rows: int, seed: int) -> tuple[Int64Array, npt.NDArray[np.float32]]:
    """Draw keys (N,) and decoded features (N, D) of random live rows, at most `num_rows`.

    From each of up to 64 random shards rows that are neighbours there, so that few row groups are read: keys are
    hashed, so neighbours have nothing in common.
    """
    draw = np.random.default_rng(seed)
    shards = draw.permutation(sorted(snapshot.manifest.shards))[:_SAMPLED_SHARDS]
    if not len(shards):
        return np.empty(0, np.int64), np.empty((0, snapshot.info.dim), np.float32)
    starts, most = draw.random(len(shards)), -(-num_rows // len(shards))

    def some(place: tuple[int, float]) -> tuple[Int64Array, npt.NDArray[np.float32]]:
        shard, start = place
        reader = snapshot.shard_reader(shard)
        keys_M = reader.keys()
        place_K = (int(start * len(keys_M)) + np.arange(min(most, len(keys_M)))) % max(1, len(keys_M))
        return keys_M[place_K], snapshot.codec.decode(reader.features(keys_M[place_K])[0])

    places = list(zip(shards.tolist(), starts.tolist(), strict=True))
    keys, features = zip(*in_threads(some, places, _THREADS), strict=True)
    return np.concatenate(keys)[:num_rows], np.concatenate(features)[:num_rows]


def _read(storage: Storage, path: str, model_class: type[ModelT]) -> ModelT | None:
    try:
        return read_sealed(storage, path, model_class)
    except FileNotFoundError:
        return None


def _finished(source: FeatureStore, storage: Storage, dtype: DType, version: int | None) -> RecodeReport | None:
    """Return the report where this recode is done already; None where the place is free. Raises StoreExistsError."""
    if storage.url == source.url:
        raise StoreExistsError(f"{storage.url} is the source itself: name another place for the new store")
    try:
        FeatureStore.open(storage.url)
    except StoreNotFoundError:
        return None
    report, wanted = read_report(storage), source.snapshot(version)
    if report is None or report.dtype != dtype or report.source_commit_id != wanted.manifest.commit_id:
        made = f", made of snapshot {report.source_version} of {report.source} as {report.dtype}" if report else ""
        raise StoreExistsError(f"{storage.url} is a store already{made}: name another place, or remove it")
    return report


def _make_plan(
    source: FeatureStore, storage: Storage, dtype: DType, version: int | None, sample_rows: int
) -> _RecodePlan:
    """Train the codec, and keep what is to be done; of several who start at once all follow the first."""
    refuse_unsafe(storage)  # before anything is written: the new store itself comes after codec and plan
    snapshot = source.snapshot(version)
    codec, sampled = Codec(dtype), 0
    if codec.has_codes:
        _, sample_ND = sample(snapshot, sample_rows, _TRAINING_SEED)
        sampled = len(sample_ND)
        if not sampled:
            raise InvalidRowsError(
                f"snapshot {snapshot.version} of {source.url} has no rows: nothing to take ranges from"
            )
        codec = Codec(dtype, train_ranges(sample_ND))
    kind = source.info.model_dump() | {"dtype": dtype, "codec": write_codec(storage, codec), "store_id": ""}
    plan = _RecodePlan(
        source=source.url,
        source_version=snapshot.version,
        source_commit_id=snapshot.manifest.commit_id,
        sampled_rows=sampled,
        info=StoreInfo.model_validate(kind),
    )
    storage.create_exclusive(_PLAN_PATH, seal(plan))
    first = _read(storage, _PLAN_PATH, _RecodePlan)
    assert first is not None, "the plan was made just now"
    return first


def _planned_snapshot(
    source: FeatureStore, storage: Storage, plan: _RecodePlan, dtype: DType, version: int | None
) -> Snapshot:
    asked = dtype, plan.source_version if version is None else version
    snapshot = source.snapshot(plan.source_version)
    if asked != (plan.info.dtype, plan.source_version) or snapshot.manifest.commit_id != plan.source_commit_id:
        raise StoreExistsError(
            f"{storage.url} is becoming a store of snapshot {plan.source_version} of {plan.source} as"
            f" {plan.info.dtype}: go on with that, name another place, or remove it"
        )
    return snapshot


def _recode_shards(
    snapshot: Snapshot, target: FeatureStore, threads: int, progress: Progress | None
) -> dict[int, _DoneShard]:
    """Recode all shards of the snapshot; those done before are not done again."""
    shards = sorted(snapshot.manifest.shards)
    done = {shard: found for shard in shards if (found := _done_shard(target.storage, shard)) is not None}
    work = [shard for shard in shards if shard not in done]
    for shard, made in zip(work, in_threads(lambda s: _recode_shard(snapshot, target, s), work, threads), strict=True):
        done[shard] = made
        if progress is not None:
            progress(len(done), len(shards))
    return done


def _done_shard(storage: Storage, shard: int) -> _DoneShard | None:
    done = _read(storage, _done_path(shard), _DoneShard)
    if done is not None and done.entry is not None:
        with contextlib.suppress(FileNotFoundError):
            return done if storage.size(done.entry.path) == done.entry.bytes else None
        return None
    return done


def _recode_shard(snapshot: Snapshot, target: FeatureStore, shard: int) -> _DoneShard:
    reader = snapshot.shard_reader(shard)
    entry, num_clipped = None, list[int]()
    if reader.num_rows:
        blocks = _encoded_blocks(reader, snapshot.codec, target, num_clipped)
        entry = write_shard_file(target.storage, target.info, shard, blocks, "base", 0)
    done = _DoneShard(entry=entry, num_clipped=sum(num_clipped))
    target.storage.write_bytes(_done_path(shard), seal(done))
    return done


def _encoded_blocks(
    reader: ShardReader, codec: Codec, target: FeatureStore, num_clipped: list[int]
) -> Iterator[pa.Table]:
    """Encode the live rows of a shard as the new store keeps them; the clipped numbers of each block go to
    `num_clipped`."""
    for block in merged_blocks(reader):
        values_KD = codec.decode(matrix_of(block, reader.info))
        bits_KD, storable_K = target.codec.encode_storable(values_KD)
        if not storable_K.all():
            uri = block[URI][int(np.flatnonzero(~storable_K)[0])]
            raise InvalidRowsError(
                f"{uri} and others have numbers that {target.info.dtype} cannot hold: choose bfloat16, float32 or int8"
            )
        num_clipped.append(target.codec.num_clipped(values_KD))
        yield live_table(block, bits_KD, target.info)


def _done_path(shard: int) -> str:
    return f"{_STAGING}/shard-{shard:04d}.json"


def _publish(target: FeatureStore, plan: _RecodePlan, done: dict[int, _DoneShard]) -> Snapshot:
    """Publish the one commit, or find it where it was made before a kill or by a twin. Raises CommitConflictError."""

    entries = {shard: [each.entry] for shard, each in done.items() if each.entry is not None}
    storage, info = target.storage, target.info
    try:
        return Commit(storage=storage, info=info, operation=plan.operation, entries=entries, only_after=0).publish()
    except CommitConflictError as error:
        first = log.find(storage, 1)
        if first is None or first.operation != plan.operation:
            message = f"{target.url} got other rows before its recode was done: remove it, and start anew"
            raise CommitConflictError(message) from error
        return Snapshot(storage, info, first)


def _report(plan: _RecodePlan, snapshot: Snapshot, made: Snapshot, num_clipped: int) -> RecodeReport:
    """Compare rows that are read back from the new store."""
    keys_N, exact_ND = sample(snapshot, _COMPARED_ROWS, _COMPARED_SEED)
    accuracy = measure_accuracy(exact_ND, made.codec.decode(made.get(keys_N)))
    num_rows = made.manifest.file_rows
    return RecodeReport(
        source=plan.source,
        source_version=plan.source_version,
        source_commit_id=plan.source_commit_id,
        source_dtype=snapshot.info.dtype,
        dtype=made.info.dtype,
        num_rows=num_rows,
        source_bytes=snapshot.manifest.file_bytes,
        bytes=made.manifest.file_bytes,
        sampled_rows=plan.sampled_rows,
        clipped_share=num_clipped / max(1, num_rows * made.info.dim),
        **asdict(accuracy),
    )
