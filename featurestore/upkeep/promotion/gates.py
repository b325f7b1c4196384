"""Gates: what is measured of a candidate snapshot, and of what has changed since the stable one, each with its limit.

Letters of shapes: N keys or rows, K queries, D feature width.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from featurestore.errors import InvalidRowsError
from featurestore.index import nearest
from featurestore.keys import Int64Array, shard_of
from featurestore.snapshot import Snapshot
from featurestore.spec import Frozen
from featurestore.storage.regular import read_text
from featurestore.store import FeatureStore
from featurestore.text.parsing import first_mistake, parse_yaml
from featurestore.upkeep.promotion import MAX_DRIFT, MAX_GAUC_LOSS, MAX_QUARANTINE, MIN_COVERAGE, MIN_NEIGHBOURS
from featurestore.upkeep.remake.remaking import sample

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
