"""Vectors of others brought into a store: the run and its staged parts.

Rows that the store has with the same numbers are not staged. What was seen is in an index with the parts, with a
digest of each row's numbers, so that the job can compare all units with each other.

Letters of shapes: N rows, M rows of the store, D feature width.

A killed run continues when the same command runs again on the same files and store.
"""

import functools
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from distributed import Client

from featurestore.format.codec import read_npy
from featurestore.format.datafile import FeatureRows, digest_column
from featurestore.keys import AnyArray, Int64Array
from featurestore.spec import ExtractorSpec
from featurestore.staging import STAGING
from featurestore.store import FeatureStore, SnapshotId
from pipeline import store_run
from pipeline.cluster.tasks import neighbours, run_all
from pipeline.errors import VectorImportError
from pipeline.formats import VectorBlock, VectorSlice, VectorSource, block_rows, read_slices
from pipeline.options import ImportOptions
from pipeline.problems import Problem

NEW, CHANGED, UNCHANGED = 0, 1, 2
INDEX_DTYPE = np.dtype([("key", "<i8"), ("low", "<u8"), ("high", "<u8"), ("state", "u1")])

IndexArray = AnyArray


@dataclass(frozen=True, kw_only=True)
class UnitReport(store_run.StagedReport):
    """The outcome for the rows of a unit, bad ones included; its file is written last, and makes the unit complete."""

    parts: Sequence[str]


def stage_unit(
    store: FeatureStore, version: int, run_id: str, unit: str, slices: Sequence[VectorSlice], rows: int
) -> UnitReport:
    """Stage what `slices` have that snapshot `version` has not, in parts of about `rows` rows.

    Raises VectorImportError, StorageError.
    """
    stored = stored_index(SnapshotId.of(store.snapshot(version)))
    parts: list[str] = []
    bad: list[store_run.BadRow] = []
    indexes, num_rows = [np.empty(0, INDEX_DTYPE)], 0
    for block in read_slices(slices, rows):
        num_rows += len(block) + len(block.bad)
        bad += block.bad
        if not len(block):
            continue
        bits_ND, storable_N = store.codec.encode_storable(store.project(block.vectors_ND))
        bad += [
            store_run.BadRow(int(block.keys_N[row]), block.uris[row], f"not finite in {store.info.dtype}")
            for row in np.flatnonzero(~storable_N)
        ]
        index_N, digests = _index(block, stored)
        indexes.append(index_N[storable_N])
        staged_N = np.flatnonzero(storable_N & (index_N["state"] != UNCHANGED))
        if len(staged_N):
            parts.append(f"{unit}-{len(parts):04d}")
            staged = FeatureRows.of(block.uris, bits_ND, keys=block.keys_N, content_digests=digests).take(staged_N)
            store.stage_part(run_id, parts[-1], staged)
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate(indexes))
    store.storage.write_bytes(_index_path(run_id, unit), buffer.getvalue())
    report = UnitReport(parts=parts, num_rows=num_rows, bad=tuple(bad))
    report.save(store, run_id, unit)
    return report


@functools.lru_cache(maxsize=1)
def stored_index(snapshot: SnapshotId) -> IndexArray:
    """Load keys and digests of the rows of a snapshot, by key; 25 bytes a row, kept until another is asked for."""
    table = FeatureStore.open(snapshot.url).snapshot(snapshot.version).to_arrow(["key", "content_digest"])
    values = digest_column(table).view("<u8").reshape(-1, 2)
    index = np.zeros(len(table), INDEX_DTYPE)
    index["key"], index["low"], index["high"] = table["key"].to_numpy(), values[:, 0], values[:, 1]
    return index[np.argsort(index["key"])]


def _index(block: VectorBlock, stored: IndexArray) -> tuple[IndexArray, list[bytes]]:
    """Compare rows with those of the store; give their digests too."""
    index_N = np.zeros(len(block), INDEX_DTYPE)
    index_N["key"] = block.keys_N
    vectors_ND = np.ascontiguousarray(block.vectors_ND, "<f4")
    digests = [xxhash.xxh3_128_digest(vector_D.data) for vector_D in vectors_ND]
    values = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
    index_N["low"], index_N["high"] = values[:, 0], values[:, 1]
    place_N = np.searchsorted(stored["key"], block.keys_N)
    if len(stored):
        found = stored[np.minimum(place_N, len(stored) - 1)]
        is_stored_N = found["key"] == block.keys_N
        is_same_N = is_stored_N & (found["low"] == index_N["low"]) & (found["high"] == index_N["high"])
        index_N["state"] = np.where(is_same_N, UNCHANGED, np.where(is_stored_N, CHANGED, NEW))
    return index_N, digests


def _index_path(run_id: str, unit: str) -> str:
    return f"{STAGING}/{run_id}/{unit}.index.npy"


BACKBONE = "imported"
UNKNOWN = "unknown"  # what is not known of the network


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """The counts of an import. Each row of the source is duplicate, bad, new, changed or unchanged."""

    num_rows: int
    num_new: int
    num_changed: int
    num_unchanged: int
    num_duplicates: int  # rows that repeat another, numbers too
    num_resumed: int  # rows staged by an earlier, killed run
    num_resolved: int  # were in quarantine and are good now
    bad: tuple[store_run.BadRow, ...]
    seconds: float
    store: str
    snapshot: int

    def __str__(self) -> str:
        """Return the lines that a job prints."""
        bad = f": {store_run.describe_bad(self.bad)}" if self.bad else ""
        lines = [
            f"rows         {self.num_rows:,}",
            f"new          {self.num_new:,}",
            f"changed      {self.num_changed:,}",
            f"unchanged    {self.num_unchanged:,}",
            f"duplicates   {self.num_duplicates:,} (repeated with the same numbers)",
            f"quarantined  {len(self.bad):,}{bad}",
            f"resolved     {self.num_resolved:,} (were in quarantine)",
            f"resumed      {self.num_resumed:,} (staged by an earlier run)",
            f"time         {self.seconds:.1f} s, {self.num_rows / max(self.seconds, 1e-9):,.0f} rows/s",
            f"store        {self.store}, snapshot {self.snapshot}",
        ]
        return "\n".join(lines)


def import_vectors(source: VectorSource, options: ImportOptions, client: Client) -> ImportSummary:
    """Add and replace rows; at most one commit, and none when nothing has changed. Other rows of the store stay.

    A row that is not finite, and all else that a format finds wrong, goes to the quarantine; what the store has under
    such a key stays. Needs 25 bytes of memory for each row of the source here, and of the store in every worker. Raises
    VectorImportError, also where a key comes with different numbers, StoreRunError, SpecMismatchError,
    KeyCollisionError, ClusterError and the errors of storage; what was staged by then stays for the next run.
    """
    start_s = time.monotonic()
    store_run.wait_for_worker(client)
    run = ImportRun(client, _open_store(source, options), source, options)
    reports = run.stage()
    good = run.index()
    if len(contested := contested_keys(good)):
        run.store.discard_staging(run.run_id)
        raise VectorImportError(Problem.CONTESTED_KEYS, len(contested), contested[0])
    num_rows = sum(report.num_rows for report in reports.values())
    bad = tuple(row for report in reports.values() for row in report.bad)
    if len(bad) == num_rows:
        raise VectorImportError(Problem.NO_USABLE_ROW, num_rows, store_run.describe_bad(bad))
    run.parts = [part for report in reports.values() for part in report.parts]
    run.num_rows = int(np.count_nonzero(good["state"] != UNCHANGED))
    keys, first = np.unique(good["key"], return_index=True)
    states = good["state"][first]
    run.quarantine(bad)
    resolved = run.recovered(keys, bad)
    version = run.commit("import", len(bad), resolved)
    return ImportSummary(
        num_rows=num_rows,
        num_new=int(np.count_nonzero(states == NEW)),
        num_changed=int(np.count_nonzero(states == CHANGED)),
        num_unchanged=int(np.count_nonzero(states == UNCHANGED)),
        num_duplicates=len(good) - len(keys),
        num_resumed=run.num_resumed,
        num_resolved=len(resolved),
        bad=bad,
        seconds=time.monotonic() - start_s,
        store=run.store.url,
        snapshot=version,
    )


def _open_store(source: VectorSource, options: ImportOptions) -> FeatureStore:
    """Open the store, or make it. Raises SpecMismatchError when it is of another origin, width or layout."""
    found = store_run.find_store(options.store)
    asked = {
        "num_shards": options.num_shards,
        "name": options.name,
        "dtype": options.dtype,
        "dim": source.dim,
        "extractor": extractor_of(options.origin or (found.info.extractor.layer if found else UNKNOWN)),
    }
    return store_run.open_or_make(options.store, asked)


def extractor_of(origin: str) -> ExtractorSpec:
    """Return the spec of imported vectors: of their network, only the name that the user gives is known."""
    return ExtractorSpec(
        backbone=BACKBONE, layer=origin, weights_digest=UNKNOWN, preprocessing=UNKNOWN, compute_dtype=UNKNOWN
    )


def contested_keys(index: IndexArray) -> Int64Array:
    """Find the keys that have rows with different numbers, ascending."""
    order = np.lexsort((index["high"], index["low"], index["key"]))
    rows = index[order]
    same_key = rows["key"][1:] == rows["key"][:-1]
    other = (rows["low"][1:] != rows["low"][:-1]) | (rows["high"][1:] != rows["high"][:-1])
    contested: Int64Array = np.unique(rows["key"][1:][same_key & other])
    return contested


class ImportRun(store_run.StoreRun):
    """A StoreRun of vectors: the units of a source, each staged by one task."""

    def __init__(self, client: Client, store: FeatureStore, source: VectorSource, options: ImportOptions) -> None:
        self._rows = options.part_size or block_rows(source.dim)
        units = neighbours(source.slices, [piece.num_rows for piece in source.slices], self._rows)
        self._units = {f"{number:06d}": slices for number, slices in enumerate(units)}
        snapshot = store.snapshot()
        commit_id = snapshot.manifest.commit_id
        run_id = store_run.run_id_of("import", store.info.digest, source.fingerprint, source.dim, self._rows, commit_id)
        super().__init__(client, store, run_id, snapshot)
        self.num_resumed = 0  # rows

    def stage(self) -> dict[str, UnitReport]:
        """Stage all units that an earlier run did not; return the reports of all."""
        names = self.store.storage.list(f"{STAGING}/{self.run_id}")
        complete = [unit for unit in self._units if f"{unit}{store_run.REPORT}" in names]
        reports = {unit: UnitReport.load(self.store, self.run_id, unit) for unit in complete}
        self.num_resumed = sum(report.num_rows for report in reports.values())
        left = {unit: slices for unit, slices in self._units.items() if unit not in reports}
        of_all = self.store, self.snapshot.version, self.run_id
        calls = [(*of_all, unit, slices, self._rows) for unit, slices in left.items()]
        advice = "give workers more, or set a smaller --part-size"
        reports |= zip(left, run_all(self.client, "reading", stage_unit, calls, advice), strict=True)
        return {unit: reports[unit] for unit in self._units}

    def index(self) -> IndexArray:
        """Load the rows of all units, in their order."""
        paths = [_index_path(self.run_id, unit) for unit in self._units]
        indexes = [read_npy(self.store.storage.read_bytes(path)) for path in paths]
        return np.concatenate([np.empty(0, INDEX_DTYPE), *indexes])
