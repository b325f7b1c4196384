"""Reduce: a compact store with the principal components of another's rows, and what they keep of these.

Letters of shapes: N rows, D width of the full rows, K components.
"""

import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import numpy as np

from featurestore.errors import CorruptFileError, InvalidRowsError, StoreExistsError
from featurestore.format.basis import Basis, basis_of, write_basis
from featurestore.snapshot import Snapshot
from featurestore.spec import SAMPLE_ROWS, OptionalId, Sealed
from featurestore.storage.storage import Storage
from featurestore.storage.threads import Progress
from featurestore.store import FeatureStore
from featurestore.text.dtypes import DType
from featurestore.upkeep.remake.accuracy import measure_accuracy
from featurestore.upkeep.remake.components import principal_components
from featurestore.upkeep.remake.remaking import (
    COMPARED_ROWS,
    COMPARED_SEED,
    Made,
    Remake,
    RemakePlan,
    default_threads,
    described,
    read_or_none,
    sample,
)

REDUCE_REPORT = "reports/reduce.json"


class ReduceReport(Sealed):
    """Results of a reduction, and what it kept; `reports/reduce.json` of the new store.

    Errors, angles and neighbours are of the full rows that the stored ones describe, their rounding included.
    """

    source: str
    source_version: int
    source_commit_id: OptionalId
    source_dtype: DType
    dtype: DType
    source_dim: int
    dim: int
    basis_sha256: str
    num_rows: int
    source_bytes: int
    bytes: int
    row_bytes_share: float  # of a feature here, by one of the source
    variance_kept: float  # share of the variance of all rows
    sampled_rows: int  # the ranges of int8 come from these
    clipped_share: float
    num_compared: int
    num_queries: int
    relative_error_mean: float | None
    relative_error_p99: float | None
    cosine_mean: float | None
    cosine_min: float | None
    recall_at_10: float | None


def reduce(
    source: FeatureStore,
    target_url: str | os.PathLike[str],
    dims: int,
    dtype: DType | None = None,
    *,
    version: int | None = None,
    sample_rows: int = SAMPLE_ROWS,
    threads: int | None = None,
    progress: Progress | None = None,
    find: Callable[[Snapshot, int], Basis] | None = None,
) -> ReduceReport:
    """Make a compact store at `target_url`: a snapshot's live rows along their `dims` principal components.

    The coordinates are in `dtype` (None: as the source, bfloat16 for int8). Reads all rows twice, for the components
    and for the rows; `progress` counts the shards of both times. `find` gives the components where they are known
    already. After a kill the same call again continues with the rows, while components that were not found yet are
    begun anew; it gives the report where all is done. `principal_components` says what memory and time it needs, and
    when it raises InvalidRowsError; StoreExistsError where something else is at the place; CorruptFileError.
    """
    remake = Remake("reduce", source, Storage(target_url, keep_inside=True))
    dtype = dtype or ("bfloat16" if source.info.dtype == "int8" else source.info.dtype)
    if source.info.reduction is not None:
        raise InvalidRowsError(
            f"{source.url} is compact already, {described(source.info)}: reduce the store that it was made of"
        )
    plan = remake.plan()
    if plan is None:
        if not remake.check_free():
            return _finished_reduce(remake, dims, dtype, version)
        snapshot = source.snapshot(version)
        read = partial(principal_components, threads=threads, progress=_part(progress, 0))
        plan = _plan_reduce(remake, snapshot, (find or read)(snapshot, dims), dtype, sample_rows)
    snapshot = remake.planned_snapshot(plan, {"dim": dims, "dtype": dtype}, version)
    basis = _planned_basis(remake, plan)
    made = remake.make(plan, snapshot, basis.project, threads or default_threads(), _part(progress, 1))
    report = _report_reduce(plan, snapshot, made, basis)
    remake.end(REDUCE_REPORT, report)
    return report


def _part(progress: Progress | None, reading: int) -> Progress | None:
    """Return what counts shards of the first reading of two (0), or of the second (1)."""
    return None if progress is None else lambda done, total: progress(reading * total + done, 2 * total)


def read_reduce_report(storage: Storage) -> ReduceReport | None:
    """Read the report of the reduction that made the store at this place, if one did. Raises CorruptFileError."""
    return read_or_none(storage, REDUCE_REPORT, ReduceReport)


def _finished_reduce(remake: Remake, dims: int, dtype: DType, version: int | None) -> ReduceReport:
    """Return the report of the store that is there, if this reduction made it. Raises StoreExistsError."""
    report, wanted = read_reduce_report(remake.storage), remake.source.snapshot(version)
    asked = dims, dtype, wanted.manifest.commit_id
    if report is None or (report.dim, report.dtype, report.source_commit_id) != asked:
        info = FeatureStore.open(remake.storage.url).info
        made = ""
        if report is not None:
            made = f", made of snapshot {report.source_version} of {report.source} as {described(info)}"
        elif info.reduction is not None:
            made = f" with another basis, {described(info)}"
        raise StoreExistsError(f"{remake.storage.url} is a store already{made}: name another place, or remove it")
    return report


def _plan_reduce(remake: Remake, snapshot: Snapshot, basis: Basis, dtype: DType, sample_rows: int) -> RemakePlan:
    changes = {
        "dim": basis.dim,
        "dtype": dtype,
        "codec": None,
        "reduction": write_basis(remake.storage, basis),
    }
    info = snapshot.info.model_copy(update=changes)
    return remake.make_plan(snapshot, info, basis.project, sample_rows)


def _planned_basis(remake: Remake, plan: RemakePlan) -> Basis:
    basis = basis_of(plan.info, remake.storage)
    if basis is None:
        raise CorruptFileError(f"the plan of {remake.storage.url} names no basis: remove it, and start anew")
    return basis


def _report_reduce(plan: RemakePlan, snapshot: Snapshot, made: Made, basis: Basis) -> ReduceReport:
    """Compare rows that are read back from the new store."""
    keys_N, exact_ND = sample(snapshot, COMPARED_ROWS, COMPARED_SEED)
    new = made.snapshot
    kept_ND = basis.restored(new.codec.decode(new.get(keys_N)))
    num_rows, info = new.manifest.file_rows, new.info
    assert info.reduction is not None
    return ReduceReport(
        source=plan.source,
        source_version=plan.source_version,
        source_commit_id=plan.source_commit_id,
        source_dtype=snapshot.info.dtype,
        dtype=info.dtype,
        source_dim=snapshot.info.dim,
        dim=info.dim,
        basis_sha256=info.reduction.sha256,
        num_rows=num_rows,
        source_bytes=snapshot.manifest.file_bytes,
        bytes=new.manifest.file_bytes,
        row_bytes_share=info.row_bytes / snapshot.info.row_bytes,
        variance_kept=basis.variance_kept,
        sampled_rows=plan.sampled_rows,
        clipped_share=made.num_clipped / max(1, num_rows * info.dim),
        **asdict(measure_accuracy(exact_ND, kept_ND.astype(np.float32))),
    )
