"""Recode: a new store with the rows of another in another dtype, and what that costs in accuracy."""

import os
from dataclasses import asdict

from featurestore.errors import StoreExistsError
from featurestore.format.basis import basis_of, write_basis
from featurestore.snapshot import Snapshot
from featurestore.spec import SAMPLE_ROWS, OptionalId, Sealed
from featurestore.storage.storage import Storage
from featurestore.storage.threads import Progress
from featurestore.store import FeatureStore
from featurestore.text.dtypes import DType
from featurestore.upkeep.remake.accuracy import measure_accuracy
from featurestore.upkeep.remake.remaking import (
    COMPARED_ROWS,
    COMPARED_SEED,
    Float32Array,
    Made,
    Remake,
    RemakePlan,
    default_threads,
    read_or_none,
    sample,
)

RECODE_REPORT = "reports/recode.json"


class RecodeReport(Sealed):
    """Results of a recode, and what it cost in accuracy; `reports/recode.json` of the new store."""

    source: str
    source_version: int
    source_commit_id: OptionalId
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

    That of a compact store has its basis. The same call again continues after a kill, with the same snapshot, and gives
    the report where all is done. Needs the memory of a few blocks for each thread, and of `sample_rows` in float32.
    Raises StoreExistsError where something else is at the place, InvalidRowsError where there are no rows to take
    ranges from or `dtype` cannot hold one, CorruptFileError before anything of a damaged file is used.
    """
    remake = Remake("recode", source, Storage(target_url, keep_inside=True))
    plan = remake.plan()
    if plan is None:
        if not remake.check_free():
            return _finished_recode(remake, dtype, version)
        plan = _plan_recode(remake, dtype, version, sample_rows)
    snapshot = remake.planned_snapshot(plan, {"dtype": dtype}, version)
    made = remake.make(plan, snapshot, _unchanged, threads or default_threads(), progress)
    report = _report_recode(plan, snapshot, made)
    remake.end(RECODE_REPORT, report)
    return report


def read_recode_report(storage: Storage) -> RecodeReport | None:
    """Read the report of the recode that made the store at this place, if one did. Raises CorruptFileError."""
    return read_or_none(storage, RECODE_REPORT, RecodeReport)


def _unchanged(values_ND: Float32Array) -> Float32Array:
    return values_ND


def _finished_recode(remake: Remake, dtype: DType, version: int | None) -> RecodeReport:
    """Return the report of the store that is there, if this recode made it. Raises StoreExistsError."""
    report, wanted = read_recode_report(remake.storage), remake.source.snapshot(version)
    if report is None or report.dtype != dtype or report.source_commit_id != wanted.manifest.commit_id:
        made = f", made of snapshot {report.source_version} of {report.source} as {report.dtype}" if report else ""
        raise StoreExistsError(f"{remake.storage.url} is a store already{made}: name another place, or remove it")
    return report


def _plan_recode(remake: Remake, dtype: DType, version: int | None, sample_rows: int) -> RemakePlan:
    source, changes = remake.source, dict[str, object](dtype=dtype, codec=None)
    if (basis := basis_of(source.info, source.storage)) is not None:
        changes["reduction"] = write_basis(remake.storage, basis)
    return remake.make_plan(source.snapshot(version), source.info.model_copy(update=changes), _unchanged, sample_rows)


def _report_recode(plan: RemakePlan, snapshot: Snapshot, made: Made) -> RecodeReport:
    """Compare rows that are read back from the new store."""
    keys_N, exact_ND = sample(snapshot, COMPARED_ROWS, COMPARED_SEED)
    new = made.snapshot
    accuracy = measure_accuracy(exact_ND, new.codec.decode(new.get(keys_N)))
    num_rows = new.manifest.file_rows
    return RecodeReport(
        source=plan.source,
        source_version=plan.source_version,
        source_commit_id=plan.source_commit_id,
        source_dtype=snapshot.info.dtype,
        dtype=new.info.dtype,
        num_rows=num_rows,
        source_bytes=snapshot.manifest.file_bytes,
        bytes=new.manifest.file_bytes,
        sampled_rows=plan.sampled_rows,
        clipped_share=made.num_clipped / max(1, num_rows * new.info.dim),
        **asdict(accuracy),
    )
