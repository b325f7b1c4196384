"""Promotion: gates between a candidate snapshot and the one in a channel.

Letters of shapes: N keys or rows, K queries, D feature width.

channels/<to>/decisions/00000000000000000003.json    the third decision about a channel: what each gate found

Letters of shapes: C rows that both have, K rows whose features are compared, D feature width.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from featurestore import log
from featurestore.errors import InvalidRowsError, SpecMismatchError
from featurestore.format.datafile import KEY, numpy_column
from featurestore.index import nearest
from featurestore.keys import Int64Array, shard_of
from featurestore.log import CHANNELS, versions
from featurestore.parsing import first_mistake, parse_yaml
from featurestore.published.channels import check_channel_name, last_move, last_number
from featurestore.published.versions import append_numbered
from featurestore.snapshot import Snapshot
from featurestore.spec import LAST_SECOND, Frozen, OptionalId, RandomId, Sealed, Version, read_sealed
from featurestore.storage.local import read_text
from featurestore.storage.storage import Storage
from featurestore.storage.threads import Progress
from featurestore.store import FeatureStore
from featurestore.upkeep import MAX_DRIFT, MAX_GAUC_LOSS, MAX_QUARANTINE, MIN_COVERAGE, MIN_NEIGHBOURS
from featurestore.upkeep.history import move_channel
from featurestore.upkeep.remake import sample

Share = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[float, Field(ge=0)]


class GateLimits(Frozen):
    """Limits of the gates, and how much is looked at. In YAML the same names."""

    min_coverage: Share = MIN_COVERAGE
    """Of the keys that have to have a row: the share that has one."""
    max_quarantine: Share = MAX_QUARANTINE
    """Of the images that the store was given: the share that could not be read."""
    max_drift: Size = MAX_DRIFT
    """Of any dimension: so far may mean or standard deviation move, in stable's standard deviations."""
    min_neighbours: Share = MIN_NEIGHBOURS
    """Of an image's nearest neighbours: the share that stays."""
    max_gauc_loss: Size = MAX_GAUC_LOSS
    """Of a canary evaluation: no worse than this, at the lower end of the difference's interval."""
    num_neighbours: Annotated[int, Field(ge=1, le=1000)] = 10
    num_rows: Annotated[int, Field(ge=10, le=1_000_000)] = 5_000
    """Images among which neighbours are looked for, drawn from those that both snapshots have."""
    num_queries: Annotated[int, Field(ge=1)] = 500
    """Of these, whose neighbours are compared."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draw."""


class GateResult(Frozen):
    """What one gate found; `value` is None where there was nothing to measure."""

    gate: str
    value: float | None
    limit: float
    holds: bool
    text: str
    """What the value is of, for people."""


Gate = Callable[[Snapshot, Snapshot | None], GateResult]
"""Of the candidate and the stable snapshot, which may not be there yet."""


def read_limits(file: Path) -> GateLimits:
    """Read limits from a YAML file. Raises InvalidRowsError."""
    try:
        values = parse_yaml(read_text(file))
        return GateLimits.model_validate({} if values is None else values)
    except ValidationError as error:
        raise InvalidRowsError(f"{file}: {first_mistake(error)}; known are {', '.join(GateLimits.model_fields)}") from (
            error
        )
    except (OSError, ValueError) as error:
        raise InvalidRowsError(f"{file} is no file of limits: {error}") from error


def coverage(candidate: Snapshot, stable: Snapshot | None, keys: Int64Array | None, limits: GateLimits) -> GateResult:
    """Measure the share of `keys` that have a row in the candidate; without keys, of those that stable has.

    Reads the keys of both snapshots, shard by shard.
    """
    if keys is None and stable is None:
        share, text = float(candidate.num_rows > 0), f"{candidate.num_rows:,} rows, and nothing to compare them with"
    else:
        wanted = np.unique(keys) if keys is not None else None
        found = total = 0
        for shard in range(candidate.info.num_shards):
            if wanted is not None:
                asked = wanted[shard_of(wanted, candidate.info.num_shards) == shard]
            else:
                assert stable is not None
                asked = _keys_of(stable, shard)
            total += len(asked)
            found += int(np.isin(asked, _keys_of(candidate, shard)).sum())
        share = found / total if total else 1.0
        text = f"{found:,} of {total:,} keys {'asked for' if keys is not None else 'of stable'} have a row"
    return GateResult(
        gate="coverage", value=share, limit=limits.min_coverage, holds=share >= limits.min_coverage, text=text
    )


def quarantine(store: FeatureStore, candidate: Snapshot, limits: GateLimits) -> GateResult:
    """Measure the share of images in quarantine, of those and the candidate's rows."""
    bad, rows = len(store.quarantine_rows()), candidate.num_rows
    share = bad / (bad + rows) if bad + rows else 0.0
    return GateResult(
        gate="quarantine",
        value=share,
        limit=limits.max_quarantine,
        holds=share <= limits.max_quarantine,
        text=f"{bad:,} of {bad + rows:,} images are in quarantine",
    )


def drift(candidate: Snapshot, stable: Snapshot | None, limits: GateLimits) -> GateResult:
    """Measure how far mean or deviation of a dimension have moved, in stable's deviations: the largest of all.

    Deviations below their mean count as that: of a unit that fires for one image in a thousand, one more such image
    moves the deviation by a half. Read from the files' statistics, and from the rows of shards with deltas.
    """
    before, after = (None if each is None else each.statistics() for each in (stable, candidate))
    if before is None or after is None or not before.count or not after.count:
        return _nothing("drift", limits.max_drift)
    deviation_D = before.std_D.astype(np.float64)
    scale_D = 1 / np.maximum(np.maximum(deviation_D, deviation_D.mean()), np.finfo(np.float64).tiny)
    moved = (after.mean_D.astype(np.float64) - before.mean_D, after.std_D.astype(np.float64) - before.std_D)
    moved_2D = np.abs(np.stack(moved) * scale_D)
    kind, dimension = np.unravel_index(int(moved_2D.argmax()), moved_2D.shape)
    value = float(moved_2D[kind, dimension])
    return GateResult(
        gate="drift",
        value=value,
        limit=limits.max_drift,
        holds=value <= limits.max_drift,
        text=f"{('mean', 'standard deviation')[int(kind)]} of dimension {dimension} of {len(scale_D):,} moved most",
    )


def neighbours(candidate: Snapshot, stable: Snapshot | None, limits: GateLimits) -> GateResult:
    """Measure the share of the nearest neighbours, by Euclidean distance, that images of both snapshots keep.

    Rows are drawn from stable; of those that the candidate has too, each looks for its neighbours among the others.
    Where neighbours were dealt anew by chance, a share of about `num_neighbours` / rows would stay. Cost: queries x
    rows x D multiplications, twice.
    """
    if stable is None or not stable.num_rows:
        return _nothing("neighbours", limits.min_neighbours)
    keys_N, before_ND = sample(stable, limits.num_rows, limits.seed)
    after_ND, found_N = _features(candidate, keys_N)
    before_ND, after_ND, count = before_ND[found_N], after_ND[found_N], limits.num_neighbours
    if len(before_ND) < count + 2:
        return GateResult(
            gate="neighbours",
            value=None,
            limit=limits.min_neighbours,
            holds=False,
            text=f"only {len(before_ND):,} of {len(keys_N):,} drawn rows of stable are in the candidate: too few to"
            f" compare {count} neighbours",
        )
    queries = min(limits.num_queries, len(before_ND))
    near = [_others(rows_ND, queries, count) for rows_ND in (before_ND, after_ND)]
    kept = [len(np.intersect1d(old, new)) for old, new in zip(*near, strict=True)]
    value = float(np.mean(kept)) / count
    return GateResult(
        gate="neighbours",
        value=value,
        limit=limits.min_neighbours,
        holds=value >= limits.min_neighbours,
        text=f"of the {count} nearest of {queries:,} images among {len(before_ND):,} stay; by chance"
        f" {count / (len(before_ND) - 1):.3f} would",
    )


def _nothing(gate: str, limit: float) -> GateResult:
    return GateResult(gate=gate, value=None, limit=limit, holds=True, text="no stable rows to compare with")


def _keys_of(snapshot: Snapshot, shard: int) -> Int64Array:
    reader = snapshot.shard_reader(shard)
    return reader.keys() if reader.entries else np.empty(0, np.int64)


def _features(snapshot: Snapshot, keys_N: Int64Array) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Read the features of those keys that the snapshot has, decoded (N, D), and which these are (N,)."""
    stored_ND = np.zeros((len(keys_N), snapshot.info.dim), snapshot.info.storage_dtype)
    found_N, shard_N = np.zeros(len(keys_N), np.bool_), shard_of(keys_N, snapshot.info.num_shards)
    for shard in np.unique(shard_N):
        here_N = shard_N == shard
        stored_ND[here_N], found_N[here_N] = snapshot.shard_reader(int(shard)).features(keys_N[here_N])
    return snapshot.codec.decode(stored_ND), found_N


def _others(rows_ND: npt.NDArray[np.float32], queries: int, count: int) -> list[npt.NDArray[np.int64]]:
    """Find the nearest other rows of each of the first rows."""
    found_KN = nearest(rows_ND, rows_ND[:queries], count + 1)
    return [row[row != query][:count] for query, row in enumerate(found_KN)]


DECISIONS = "decisions"


class Decision(Sealed):
    """What the gates said about moving channel `target` to where `source` pointed; `number` is 0 until it is kept."""

    number: Annotated[int, Field(ge=0)]
    source: str
    target: str
    version: Version  # of the candidate
    commit_id: OptionalId
    before: Version | None  # where `target` pointed; None where it was not there
    results: tuple[GateResult, ...]
    forced: str | None  # why it moves whatever the gates say
    writer: str
    time_s: Annotated[float, Field(ge=0, le=LAST_SECOND)]
    nonce: RandomId

    @property
    def holds(self) -> bool:
        """Whether every gate holds."""
        return all(result.holds for result in self.results)

    @property
    def moves(self) -> bool:
        """Whether the channel moves."""
        return self.holds or self.forced is not None

    @property
    def is_there(self) -> bool:
        """Whether the channel pointed there already: nothing was measured."""
        return self.before == self.version


def promote(
    store: FeatureStore,
    source: str,
    target: str,
    limits: GateLimits,
    *,
    keys: Int64Array | None = None,
    more: Sequence[Gate] = (),
    dry_run: bool = False,
    force: str | None = None,
) -> Decision:
    """Move channel `target` to the snapshot of channel `source` if the gates hold, or with `force`, which is a reason.

    `keys` are those that have to have a row; without them, those of `target`'s snapshot. `more` are gates of the
    caller, such as a canary evaluation. Each decision is kept with the channel, but for a dry run. Where `target`
    points there already, nothing is measured or kept. Raises ChannelError, CommitConflictError where another writer
    moved `target` meanwhile: then it stays where that one put it.
    """
    check_channel_name(target)
    storage = store.storage
    seen = last_number(storage, target)
    found = last_move(storage, target) if seen else None
    candidate = store.snapshot(source)
    before = None if found is None or found.version is None else found.version
    is_there = found is not None and found.commit_id == candidate.manifest.commit_id
    stable = None if before is None or is_there else store.snapshot(before)
    results: list[GateResult] = []
    if not is_there:
        results = [
            coverage(candidate, stable, keys, limits),
            quarantine(store, candidate, limits),
            drift(candidate, stable, limits),
            neighbours(candidate, stable, limits),
            *(gate(candidate, stable) for gate in more),
        ]

    def decision(number: int) -> Decision:
        return Decision(
            number=number,
            source=source,
            target=target,
            version=candidate.version,
            commit_id=candidate.manifest.commit_id,
            before=before,
            results=tuple(results),
            forced=force,
            writer=log.writer_name(),
            time_s=time.time(),
            nonce=uuid.uuid4().hex,
        )

    if dry_run or is_there:
        return decision(0)
    kept = append_numbered(storage, _folder(target), decision)
    if kept.moves:
        why = f"promoted from {source}" if kept.holds else f"forced: {force}"
        move_channel(store, target, candidate.version, f"{why} (decision {kept.number})", after=seen)
    return kept


def read_decisions(storage: Storage, target: str) -> list[Decision]:
    """Read the decisions about a channel, the first one first. Raises CorruptFileError."""
    folder = _folder(target)
    numbers = versions(storage, folder)
    return [read_sealed(storage, log.manifest_path(number, folder), Decision) for number in numbers]


def lines(decision: Decision, dry_run: bool) -> list[str]:
    """Write what a command prints after the table of gates."""
    target, version = decision.target, decision.version
    stays = "is not there, and is not made" if decision.before is None else f"stays at snapshot {decision.before}"
    if decision.is_there:
        return [f"{target} points to snapshot {version} already: nothing to do"]
    if not decision.moves:
        return [f"{target} {stays}"]
    would = "would point" if dry_run else "points"
    kept = "" if dry_run else f", decision {decision.number}"
    forced = "" if decision.holds else f" by --force, though gates fail: {decision.forced}"
    return [f"{target} {would} to snapshot {version}{forced}{kept}"]


def failures(decision: Decision) -> list[str]:
    """Write one line for each gate that fails: its name, value and limit, and what the value is of."""
    found = []
    for result in decision.results:
        if not result.holds:
            value = "not measured" if result.value is None else f"{result.value:.4g}"
            found.append(f"gate {result.gate}: {value}, limit {result.limit:g}: {result.text}")
    return found


def _folder(target: str) -> str:
    return f"{CHANNELS}/{check_channel_name(target)}/{DECISIONS}"


DIGEST = "content_digest"
# Rounding moves a feature by less than a hundredth of its length, also in bfloat16 and on another processor; features
# of two images differ by a quarter and more (their mean cosine is .96 in the fc6 of a seeded VGG16).
SAME_WITHIN = 0.05
_SAMPLED_SHARDS = 16  # keys are dealt to shards by a hash, so rows of a few shards are a fair sample of all

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How alike the rows of two snapshots are.

    `num_changed`: of the common rows, those with another image (content digest). Of the other common ones `num_sampled`
    had their features compared: differences are in parts of a feature's length; None where nothing was compared."""

    num_old: int
    num_new: int
    num_common: int
    num_changed: int
    num_sampled: int
    num_equal: int
    """To the bit."""
    num_other: int
    """Further apart than SAME_WITHIN: not the same image, or not the same network."""
    mean_cosine: float | None
    largest_difference: float | None

    @property
    def num_gained(self) -> int:
        return self.num_new - self.num_common

    @property
    def num_lost(self) -> int:
        return self.num_old - self.num_common


def compare(
    old: Snapshot, new: Snapshot, sample_rows: int, seed: int = 0, progress: Progress | None = None
) -> Likeness:
    """Compare keys and content digests of both snapshots, shard by shard, and the features of about `sample_rows` rows.

    The two may have different numbers of shards. Raises SpecMismatchError where their features are of different kinds,
    CorruptFileError.
    """
    kinds = [each.info.model_copy(update={"num_shards": 1, "name": ""}).digest for each in (old, new)]
    if kinds[0] != kinds[1]:
        raise SpecMismatchError(
            f"{old.storage.url} and {new.storage.url} have features of different kinds: nothing to compare"
        )
    num_groups = min(old.info.num_shards, new.info.num_shards)
    chosen = np.random.default_rng(seed).permutation(num_groups)[:_SAMPLED_SHARDS].tolist()
    counts, features = np.zeros(4, np.int64), [np.empty((0, old.info.dim), np.float32)] * 2
    equal = 0
    for group in range(num_groups):
        old_keys, old_digests = _live_rows(old, group, num_groups)
        new_keys, new_digests = _live_rows(new, group, num_groups)
        common_C, at_C, other_C = np.intersect1d(old_keys, new_keys, assume_unique=True, return_indices=True)
        same_C = np.asarray(old_digests[at_C] == new_digests[other_C], np.bool_)
        counts += [len(old_keys), len(new_keys), len(common_C), int((~same_C).sum())]
        if group in chosen:
            keys_K = old_keys[np.sort(at_C[same_C])][: -(-sample_rows // len(chosen))]
            stored = [each.get(keys_K) for each in (old, new)]
            equal += int((stored[0] == stored[1]).all(axis=1).sum())
            decoded = [each.codec.decode(rows) for each, rows in zip((old, new), stored, strict=True)]
            features = [np.concatenate(pair) for pair in zip(features, decoded, strict=True)]
        if progress is not None:
            progress(group + 1, num_groups)
    num_other, mean_cosine, largest = _differences(*features)
    return Likeness(
        num_old=int(counts[0]),
        num_new=int(counts[1]),
        num_common=int(counts[2]),
        num_changed=int(counts[3]),
        num_sampled=len(features[0]),
        num_equal=equal,
        num_other=num_other,
        mean_cosine=mean_cosine,
        largest_difference=largest,
    )


def _live_rows(snapshot: Snapshot, group: int, num_groups: int) -> tuple[Int64Array, npt.NDArray[np.object_]]:
    """Read keys and content digests of one of `num_groups` groups of neighbouring shards."""
    size = snapshot.info.num_shards // num_groups
    readers = [snapshot.shard_reader(shard) for shard in range(group * size, (group + 1) * size)]
    tables = [reader.read([KEY, DIGEST]) for reader in readers if reader.entries]
    digests = [each for table in tables for each in table[DIGEST].to_pylist()]
    keys = [np.empty(0, np.int64), *(numpy_column(table, KEY) for table in tables)]
    return np.concatenate(keys), np.asarray(digests, object)


def _differences(old_KD: Float32Array, new_KD: Float32Array) -> tuple[int, float | None, float | None]:
    """Count rows that are not the same; return that, mean cosine, and the largest difference.

    The difference is in parts of the longer one's length."""
    if not len(old_KD):
        return 0, None, None
    length_K, other_K = (np.linalg.norm(each.astype(np.float64), axis=1) for each in (old_KD, new_KD))
    longer_K = np.maximum(np.maximum(length_K, other_K), 1e-30)
    apart_K = np.linalg.norm(old_KD.astype(np.float64) - new_KD, axis=1) / longer_K
    dot_K = np.einsum("kd,kd->k", old_KD, new_KD, dtype=np.float64)
    cosine_K = np.where(apart_K == 0, 1.0, dot_K / np.maximum(length_K * other_K, 1e-30))
    return int((apart_K > SAME_WITHIN).sum()), float(cosine_K.mean()), float(apart_K.max())
