"""The part that recode and reduce share: a new store of another one's rows, made shard by shard, published at once.

What is done is noted in `staging/KIND` of the new store, so a command that was killed continues where it stopped.
Letters of shapes: M live rows of a shard, K of them in a block, D feature width.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

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
from featurestore.spec import FileEntry, ModelT, OptionalId, Sealed, StoreInfo, read_sealed, seal
from featurestore.staging import STAGING
from featurestore.storage.safety import refuse_unsafe
from featurestore.storage.storage import Storage
from featurestore.storage.threads import Progress, in_threads
from featurestore.store import FeatureStore
from featurestore.upkeep.compaction import merged_blocks

TRAINING_SEED, COMPARED_SEED = 0, 1
COMPARED_ROWS = 5_000
_THREADS = 4
_SAMPLED_SHARDS = 64

Float32Array = npt.NDArray[np.float32]
Transform = Callable[[Float32Array], Float32Array]  # (N, D) as the source means them to (N, K) for the new store


class RemakePlan(Sealed):
    """What is made of what; written before the new store, whose codec and basis are there by then."""

    source: str
    source_version: int
    source_commit_id: OptionalId
    sampled_rows: int
    info: StoreInfo


class _DoneShard(Sealed):
    """A shard whose file is written; without an entry where it has no live rows."""

    entry: FileEntry | None
    num_clipped: int


@dataclass(frozen=True)
class Made:
    """The new store's first snapshot, and how many numbers its codec had to clip."""

    snapshot: Snapshot
    num_clipped: int


@dataclass(frozen=True)
class Remake:
    """One new store at `storage`, made of `source`."""

    kind: Literal["recode", "reduce"]
    source: FeatureStore
    storage: Storage

    def check_free(self) -> bool:
        """Return whether a store can be made here; False where one is there already.

        Before anything is written: the new store itself comes after codec, basis and plan. Raises StoreExistsError
        where the place is that of the source itself, or inside it, UnsafeBackendError."""
        if self.storage.url == self.source.url:
            raise StoreExistsError(f"{self.storage.url} is the source itself: name another place for the new store")
        if self.storage.url.startswith(f"{self.source.url.rstrip('/')}/"):  # what cleans the source up would find it
            raise StoreExistsError(f"{self.storage.url} is inside the source: name another place for the new store")
        with contextlib.suppress(StoreNotFoundError):
            FeatureStore.open(self.storage.url)
            return False
        refuse_unsafe(self.storage)
        return True

    def plan(self) -> RemakePlan | None:
        """Read what an earlier call planned and did not end."""
        return read_or_none(self.storage, self._plan_path, RemakePlan)

    def make_plan(self, snapshot: Snapshot, info: StoreInfo, transform: Transform, sample_rows: int) -> RemakePlan:
        """Train the codec of `info`, whose own does not count, and keep what is to be done.

        Of several who start at once all follow the first. Raises InvalidRowsError where there is nothing to train on.
        """
        codec, sampled = Codec(info.dtype), 0
        if codec.has_codes:
            _, sample_ND = sample(snapshot, sample_rows, TRAINING_SEED)
            sampled = len(sample_ND)
            if not sampled:
                raise InvalidRowsError(
                    f"snapshot {snapshot.version} of {self.source.url} has no rows: nothing to take ranges from"
                )
            codec = Codec(info.dtype, train_ranges(transform(sample_ND)))
        kind = info.model_dump() | {"codec": write_codec(self.storage, codec), "store_id": ""}
        plan = RemakePlan(
            source=self.source.url,
            source_version=snapshot.version,
            source_commit_id=snapshot.manifest.commit_id,
            sampled_rows=sampled,
            info=StoreInfo.model_validate(kind),
        )
        self.storage.create_exclusive(self._plan_path, seal(plan))
        first = self.plan()
        assert first is not None, "the plan was made just now"
        return first

    def planned_snapshot(self, plan: RemakePlan, wanted: dict[str, object], version: int | None) -> Snapshot:
        """Open the snapshot of the plan.

        Raises StoreExistsError where the plan has other fields than `wanted`, or is of another snapshot."""
        asked = wanted, plan.source_version if version is None else version
        found = {name: getattr(plan.info, name) for name in wanted}
        snapshot = self.source.snapshot(plan.source_version)
        if asked != (found, plan.source_version) or snapshot.manifest.commit_id != plan.source_commit_id:
            raise StoreExistsError(
                f"{self.storage.url} is becoming a store of snapshot {plan.source_version} of {plan.source} as"
                f" {described(plan.info)}: continue with that, name another place, or remove it"
            )
        return snapshot

    def make(
        self, plan: RemakePlan, snapshot: Snapshot, transform: Transform, threads: int, progress: Progress | None
    ) -> Made:
        """Make all shards that are not done yet, and publish them by one commit.

        A commit that was made before a kill, or by a twin, is found. Raises CommitConflictError, InvalidRowsError,
        CorruptFileError."""
        target = FeatureStore.open_or_create(self.storage.url, plan.info)
        shards = sorted(snapshot.manifest.shards)
        done = {shard: found for shard in shards if (found := self._done_shard(shard)) is not None}
        work = [shard for shard in shards if shard not in done]

        def make_shard(shard: int) -> _DoneShard:
            return self._make_shard(snapshot, target, transform, shard)

        for shard, made in zip(work, in_threads(make_shard, work, threads), strict=True):
            done[shard] = made
            if progress is not None:
                progress(len(done), len(shards))
        target.add_quarantine(self.source.quarantine_rows())
        return Made(self._publish(target, plan, done), sum(shard.num_clipped for shard in done.values()))

    def end(self, report_path: str, report: Sealed) -> None:
        """Keep the report, and remove the notes of what was done."""
        self.storage.write_bytes(report_path, seal(report))
        FeatureStore.open(self.storage.url).discard_staging(self.kind)

    def _make_shard(self, snapshot: Snapshot, target: FeatureStore, transform: Transform, shard: int) -> _DoneShard:
        reader = snapshot.shard_reader(shard)
        entry, num_clipped = None, list[int]()
        if reader.num_rows:
            blocks = _encoded_blocks(reader, snapshot.codec, target, transform, num_clipped)
            entry = write_shard_file(target.storage, target.info, shard, blocks, "base", 0)
        done = _DoneShard(entry=entry, num_clipped=sum(num_clipped))
        target.storage.write_bytes(self._done_path(shard), seal(done))
        return done

    def _done_shard(self, shard: int) -> _DoneShard | None:
        done = read_or_none(self.storage, self._done_path(shard), _DoneShard)
        if done is not None and done.entry is not None:
            with contextlib.suppress(FileNotFoundError):
                return done if self.storage.size(done.entry.path) == done.entry.bytes else None
            return None
        return done

    def _publish(self, target: FeatureStore, plan: RemakePlan, done: dict[int, _DoneShard]) -> Snapshot:
        operation = f"{self.kind} of snapshot {plan.source_version} ({plan.source_commit_id})"
        entries = {shard: [each.entry] for shard, each in done.items() if each.entry is not None}
        storage, info = target.storage, target.info
        try:
            return Commit(storage=storage, info=info, operation=operation, entries=entries, only_after=0).publish()
        except CommitConflictError as error:
            first = log.find(storage, 1)
            if first is None or first.operation != operation:
                message = f"{target.url} got other rows before its {self.kind} was done: remove it, and start anew"
                raise CommitConflictError(message) from error
            return Snapshot(storage, info, first)

    @property
    def _plan_path(self) -> str:
        return f"{STAGING}/{self.kind}/plan.json"

    def _done_path(self, shard: int) -> str:
        return f"{STAGING}/{self.kind}/shard-{shard:04d}.json"


def _encoded_blocks(
    reader: ShardReader, codec: Codec, target: FeatureStore, transform: Transform, num_clipped: list[int]
) -> Iterator[pa.Table]:
    """Encode the live rows of a shard as the new store keeps them.

    The clipped numbers of each block go to `num_clipped`."""
    for block in merged_blocks(reader):
        values_KD = transform(codec.decode(matrix_of(block, reader.info)))
        bits_KD, storable_K = target.codec.encode_storable(values_KD)
        if not storable_K.all():
            uri = block[URI][int(np.flatnonzero(~storable_K)[0])]
            raise InvalidRowsError(
                f"{uri} and others have numbers that {target.info.dtype} cannot hold: choose bfloat16, float32 or int8"
            )
        num_clipped.append(target.codec.num_clipped(values_KD))
        yield live_table(block, bits_KD, target.info)


def default_threads() -> int:
    """Count the threads of a remake where none are asked for."""
    return min(_THREADS, len(os.sched_getaffinity(0)))


def described(info: StoreInfo) -> str:
    """Say what a store keeps, for messages, e.g. 'int8, 256 of 4,096 numbers'."""
    return f"{info.dtype}, {info.width_text} numbers" if info.reduction else info.dtype


def sample(snapshot: Snapshot, num_rows: int, seed: int) -> tuple[Int64Array, Float32Array]:
    """Draw keys (N,) and decoded features (N, D) of random live rows, at most `num_rows`.

    From each of up to 64 random shards rows that are neighbours there, so that few row groups are read: keys are
    hashed, so neighbours have nothing in common.
    """
    draw = np.random.default_rng(seed)
    shards = draw.permutation(sorted(snapshot.manifest.shards))[:_SAMPLED_SHARDS]
    if not len(shards):
        return np.empty(0, np.int64), np.empty((0, snapshot.info.dim), np.float32)
    starts, most = draw.random(len(shards)), -(-num_rows // len(shards))

    def some(place: tuple[int, float]) -> tuple[Int64Array, Float32Array]:
        shard, start = place
        reader = snapshot.shard_reader(shard)
        keys_M = reader.keys()
        place_K = (int(start * len(keys_M)) + np.arange(min(most, len(keys_M)))) % max(1, len(keys_M))
        return keys_M[place_K], snapshot.codec.decode(reader.features(keys_M[place_K])[0])

    places = list(zip(shards.tolist(), starts.tolist(), strict=True))
    keys, features = zip(*in_threads(some, places, _THREADS), strict=True)
    return np.concatenate(keys)[:num_rows], np.concatenate(features)[:num_rows]


def read_or_none(storage: Storage, path: str, model_class: type[ModelT]) -> ModelT | None:
    """Read a sealed file; None where it is not there."""
    try:
        return read_sealed(storage, path, model_class)
    except FileNotFoundError:
        return None
