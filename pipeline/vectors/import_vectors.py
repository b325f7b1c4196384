"""Vectors into a store: plan, stage the units on Dask, compare them with each other, build shards, commit once.

A run that was killed goes on where it was when the same command runs again on the same files and store.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from distributed import Client

from featurestore.console.progress import progress
from featurestore.errors import StoreNotFoundError
from featurestore.format.rows import FeatureRows
from featurestore.keys import Int64Array
from featurestore.quarantine import QuarantineRow
from featurestore.spec import DType, ExtractorSpec, StoreInfo
from featurestore.store import FeatureStore
from pipeline.cluster.checks import wait_for_workers
from pipeline.cluster.tasks import Killed, run_alone, run_tasks
from pipeline.errors import VectorImportError
from pipeline.features.diff import run_id_of
from pipeline.features.staged_run import build_shards
from pipeline.vectors.source import BadRow, Slice, Source, block_rows, pack
from pipeline.vectors.stage import (
    CHANGED,
    INDEX_DTYPE,
    NEW,
    UNCHANGED,
    IndexArray,
    UnitReport,
    complete_units,
    load_index,
    stage_unit,
)
from pipeline.vectors.xdl import MAX_TORN_SHARE, WRONG_FILE

BACKBONE = "imported"
UNKNOWN = "unknown"  # what nobody told us about the network
TOMBSTONES = "tombstones"
TOMBSTONES_PER_PART = 4096  # their blank features are held in memory
WORKERS_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class ImportOptions:
    """Where to, and how. `num_shards`, `name` and `dtype` count when the store is made; None: as the store has it."""

    store: str
    name: str | None = None
    dtype: DType | None = None
    num_shards: int | None = None
    origin: str | None = None  # what made the vectors, for people and against mixing
    part_size: int | None = None  # rows; None: some megabytes
    keep_missing: bool = True
    max_gone: float = 0.5  # share of the store's rows that may vanish in one run


@dataclass(frozen=True)
class ImportSummary:
    """What an import did. Rows of the source are each one of duplicate, bad, new, changed and unchanged."""

    num_rows: int
    num_new: int
    num_changed: int
    num_unchanged: int
    num_duplicates: int  # rows that repeat another, numbers too
    num_gone: int  # removed from the store, as the source does not have their keys
    num_kept: int  # in the store and not in the source
    num_resumed: int  # rows staged by an earlier, killed run
    num_resolved: int  # were in quarantine and are good now
    bad: tuple[BadRow, ...]
    seconds: float
    store: str
    snapshot: int


def import_vectors(source: Source, options: ImportOptions, client: Client) -> ImportSummary:
    """Add and replace rows; at most one commit, and none when nothing has changed.

    A key that comes with different numbers, a row that is not finite, and whatever else a format finds wrong goes to
    the quarantine; what the store has under such a key stays. Needs 25 bytes of memory for each row of the source here,
    and of the store in every worker. Raises VectorImportError, SpecMismatchError, KeyCollisionError, ClusterError and
    the errors of storage; what was staged by then stays for the next run.
    """
    start_s = time.monotonic()
    wait_for_workers(client, str(client.scheduler_info()["address"]), 1, WORKERS_TIMEOUT_S)
    store = open_store(source, options)
    run = _Run(client, store, source, options)
    reports = run.stage()
    index = run.index()
    contested = contested_keys(index)
    if len(contested):
        reports |= run.stage_again(contested)
    bad = tuple(row for report in reports.values() for row in report.bad)
    _check_bad(source, bad, sum(report.num_rows for report in reports.values()))
    good = index[~np.isin(index["key"], contested)]
    keys, first = np.unique(good["key"], return_index=True)
    states = good["state"][first]
    missing = np.setdiff1d(run.snapshot.keys(), np.concatenate([keys, contested, _keys_of(bad)]))
    gone = missing[:0] if options.keep_missing else missing
    _check_gone(options, len(gone), len(missing) + int(np.count_nonzero(states != NEW)))
    quarantined = store.quarantine_rows()
    known = {(row.key, row.uri, row.reason) for row in quarantined}
    store.add_quarantine([QuarantineRow(*row, time.time()) for row in dict.fromkeys(bad) if tuple(row) not in known])
    version = run.commit([part for report in reports.values() for part in report.parts], gone, len(bad))
    is_good = np.isin([row.key for row in quarantined], np.setdiff1d(keys, _keys_of(bad)))
    settled = [row for row, good_now in zip(quarantined, is_good, strict=True) if good_now]
    store.resolve_quarantine(settled)
    return ImportSummary(
        num_rows=sum(report.num_rows for report in reports.values()),
        num_new=int(np.count_nonzero(states == NEW)),
        num_changed=int(np.count_nonzero(states == CHANGED)),
        num_unchanged=int(np.count_nonzero(states == UNCHANGED)),
        num_duplicates=len(good) - len(keys),
        num_gone=len(gone),
        num_kept=len(missing) - len(gone),
        num_resumed=run.num_resumed,
        num_resolved=len(settled),
        bad=bad,
        seconds=time.monotonic() - start_s,
        store=store.url,
        snapshot=version,
    )


def open_store(source: Source, options: ImportOptions) -> FeatureStore:
    """The store, made when it is new. Raises SpecMismatchError when it is of another origin, width or layout."""
    given = {"num_shards": options.num_shards, "name": options.name, "dtype": options.dtype}
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        store = FeatureStore.open(options.store)
    except StoreNotFoundError:
        if options.dtype == "int8":
            raise VectorImportError(
                f"{options.store} would be a new store in int8, whose codec is trained on features that are there:"
                " import into a bfloat16 store first, and make the int8 store of it with `python -m featurestore"
                " recode`; that one takes imports too"
            ) from None
        extractor = extractor_of(options.origin or UNKNOWN)
        info = StoreInfo.model_validate(changed | {"dim": source.dim, "extractor": extractor})
        return FeatureStore.open_or_create(options.store, info)
    origin = options.origin or store.info.extractor.layer
    changed |= {"dim": source.dim, "extractor": extractor_of(origin)}
    store.info.model_copy(update=changed).check_same(store.info, f"the store at {store.url}")
    return store


def extractor_of(origin: str) -> ExtractorSpec:
    """The spec of vectors that came from elsewhere: all that is known of their network is what a person says."""
    return ExtractorSpec(
        backbone=BACKBONE, layer=origin, weights_digest=UNKNOWN, preprocessing=UNKNOWN, compute_dtype=UNKNOWN
    )


def contested_keys(index: IndexArray) -> Int64Array:
    """Keys that have rows with different numbers, ascending."""
    order = np.lexsort((index["high"], index["low"], index["key"]))
    rows = index[order]
    same_key = rows["key"][1:] == rows["key"][:-1]
    other = (rows["low"][1:] != rows["low"][:-1]) | (rows["high"][1:] != rows["high"][:-1])
    contested: Int64Array = np.unique(rows["key"][1:][same_key & other])
    return contested


class _Run:
    """One import on its cluster."""

    def __init__(self, client: Client, store: FeatureStore, source: Source, options: ImportOptions) -> None:
        self._client = client
        self._store = store
        self._rows = options.part_size or block_rows(source.dim)
        self._units = {f"{number:06d}": slices for number, slices in enumerate(pack(source.slices, self._rows))}
        self.snapshot = store.snapshot()
        commit_id = self.snapshot.manifest.commit_id
        self._run_id = run_id_of("import", store.info.digest, source.fingerprint, source.dim, self._rows, commit_id)
        self.num_resumed = 0

    def stage(self) -> dict[str, UnitReport]:
        """The reports of all units, staged now or by an earlier run."""
        complete = complete_units(self._store.storage, self._run_id)
        reports = {unit: UnitReport.load(self._store, self._run_id, unit) for unit in self._units if unit in complete}
        self.num_resumed = sum(report.num_rows for report in reports.values())
        reports |= self._stage({unit: it for unit, it in self._units.items() if unit not in complete}, ())
        return {unit: reports[unit] for unit in self._units}

    def stage_again(self, contested: Int64Array) -> dict[str, UnitReport]:
        """The reports of the units that hold contested keys, staged without these."""
        keys = contested.tolist()
        units = {
            unit: slices
            for unit, slices in self._units.items()
            if np.isin(load_index(self._store, self._run_id, unit)["key"], contested).any()
        }
        return self._stage(units, keys)

    def index(self) -> IndexArray:
        """The rows of all units, in their order."""
        indexes = [load_index(self._store, self._run_id, unit) for unit in self._units]
        return np.concatenate([np.empty(0, INDEX_DTYPE), *indexes])

    def commit(self, parts: list[str], gone: Int64Array, num_bad: int) -> int:
        """The version after one commit, or after none where nothing has changed; staging is gone then."""
        for start in range(0, len(gone), TOMBSTONES_PER_PART):
            parts.append(f"{TOMBSTONES}-{start:08d}")
            chunk = FeatureRows.tombstones(gone[start : start + TOMBSTONES_PER_PART], self._store.info)
            self._store.stage_part(self._run_id, parts[-1], chunk)
        version = self.snapshot.version
        if parts:
            entries = build_shards(self._client, self._store, self._run_id, parts)
            version = self._store.commit(entries, "import", num_quarantined=num_bad).version
        self._store.discard_staging(self._run_id)
        return version

    def _stage(self, units: dict[str, tuple[Slice, ...]], contested: Sequence[int]) -> dict[str, UnitReport]:
        names = list(units)
        version = self.snapshot.version
        calls = [(self._store, version, self._run_id, name, units[name], self._rows, contested) for name in names]
        num_rows = sum(piece.num_rows for slices in units.values() for piece in slices)
        reports: dict[str, UnitReport] = {}
        with progress("reading again" if len(contested) else "reading", num_rows) as advance:
            for place, report in run_tasks(self._client, _stage_unit, calls):
                done = run_alone(self._client, _stage_unit, *calls[place]) if isinstance(report, Killed) else report
                if isinstance(done, Killed):
                    raise VectorImportError(
                        f"reading {units[names[place]][0].place} brings the workers down: give them more memory, or set"
                        " a smaller --part-size"
                    )
                if isinstance(done, VectorImportError):
                    raise done
                reports[names[place]] = done
                advance(done.num_rows)
        return reports


def _stage_unit(*call: Any) -> UnitReport | VectorImportError:
    """A person's mistake as a result: Dask would log a raised one with its traceback, and try again."""
    try:
        return stage_unit(*call)
    except VectorImportError as error:
        return error


def _check_bad(source: Source, bad: Sequence[BadRow], num_rows: int) -> None:
    """Raise VectorImportError where so much is wrong that the rest cannot be right."""
    misplaced = sum(row.reason == WRONG_FILE for row in bad)
    if misplaced > max(1, MAX_TORN_SHARE * num_rows):
        raise VectorImportError(
            f"{misplaced:,} of {num_rows:,} keys are in the wrong file (key k belongs in data.(k mod 1024)): is --dim"
            f" {source.dim} right?"
        )
    if len(bad) == num_rows:
        reason = f": {bad[0].uri} {bad[0].reason}" if bad else ""
        raise VectorImportError(f"none of the {num_rows:,} rows can be used{reason}")


def _check_gone(options: ImportOptions, num_gone: int, num_stored: int) -> None:
    """Raise VectorImportError where more of the store would vanish than the options allow."""
    if num_gone > options.max_gone * num_stored:
        raise VectorImportError(
            f"{num_gone:,} of the {num_stored:,} rows in {options.store} are not in the source, more than a share of"
            f" {options.max_gone:g}: is --from right? --keep-missing keeps them, --max-gone 1 lets them go"
        )


def _keys_of(bad: Sequence[BadRow]) -> Int64Array:
    return np.array([row.key for row in bad], np.int64)
