"""Stores made of another one: in another dtype, or with fewer numbers a row.

The new store is made after all of its files, so a killed command leaves no store; the same command starts again.
Letters of shapes: N rows (of a block, or compared), D width of the full rows, K components or queries.

Source of the merge of moments: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm", 1979. Blocks are
merged in the order of shards and rows, so neither compaction nor the number of files changes a bit.
"""

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
from scipy import linalg
from threadpoolctl import threadpool_limits

from featurestore import log, staging
from featurestore.errors import DimsError, InvalidRowsError, StoreExistsError, StoreNotFoundError
from featurestore.format.codec import Basis, BasisOrigin, Codec, write_basis
from featurestore.format.datafile import URI, live_table, matrix_of
from featurestore.format.shard import ShardReader, write_shard_file
from featurestore.index import nearest
from featurestore.keys import AnyArray, Float32Array, Float64Array, FloatArray, Int64Array
from featurestore.problems import Problem
from featurestore.published.versions import VersionName
from featurestore.spec import FileEntry, Frozen, OptionalId, Sealed, StoreInfo, read_sealed, seal
from featurestore.storage.safety import refuse_unsafe
from featurestore.storage.storage import Progress, Storage, in_threads
from featurestore.store import Commit, FeatureStore, Snapshot
from featurestore.text import DType
from featurestore.upkeep.compaction import merged_blocks

REPORT = "reports/remake.json"
_COMPARED_SEED, _COMPARED_ROWS = 1, 5_000
_NUM_NEIGHBOURS, _MOST_QUERIES = 10, 500
_THREADS = 4
_SAMPLED_SHARDS = 64
_PANEL = 512  # columns of a product; its numbers are summed in the same order wherever they are computed


class Accuracy(Frozen):
    """Errors of `num_compared` full rows as the stored ones describe them; None where too few had a length."""

    num_compared: int
    num_queries: int
    relative_error_mean: float | None  # distance between a row and its stored form, relative to the row's length
    relative_error_p99: float | None
    recall_at_10: float | None  # share of a row's exact nearest neighbours that are so among the kept rows too


class RemakeReport(Sealed):
    """The source of a remade store, and the precision of its rows; `reports/remake.json` of the new store."""

    source: str
    source_version: int
    source_commit_id: OptionalId
    source_dtype: DType
    commit_id: OptionalId  # of the first snapshot of the new store
    dtype: DType
    source_dim: int
    dim: int
    basis_sha256: str | None  # of the principal components; None where rows keep all their numbers
    variance_kept: float | None  # share of the variance of all rows
    num_rows: int
    source_bytes: int
    bytes: int
    row_bytes_share: float  # of a feature here, by one of the source
    accuracy: Accuracy


def remake(
    source: FeatureStore,
    target_url: str | os.PathLike[str],
    *,
    dims: int | None = None,
    dtype: DType | None = None,
    version: VersionName | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> RemakeReport:
    """Make a store at `target_url` of the live rows of a snapshot (the newest by default), and measure their loss.

    `dtype` None: as the source. With `dims` each row becomes its coordinates along that many principal components of
    all rows, which takes a second reading; `progress` counts the shards of both. Without `dims` rows keep their
    numbers, and those of a compact store their basis.

    After a kill the same call starts again: files of the first one belong to no snapshot, and `expire` removes them.
    Where all is done it gives the report. Needs the memory of a few blocks for each thread. Raises the errors of
    `principal_components`, StoreExistsError where something else is at the place, InvalidRowsError where `dtype` cannot
    hold a row, CorruptFileError before anything of a damaged file is used, CommitConflictError where another writer
    made a store at the place meanwhile.
    """
    if dims is not None and source.info.reduction is not None:
        raise InvalidRowsError(Problem.COMPACT_ALREADY, source.url, _described(source.info))
    storage, snapshot = Storage(target_url, keep_inside=True), source.snapshot(version)
    dtype = dtype or source.info.dtype
    report = _finished(source, snapshot, storage, dims, dtype)
    if report is not None:
        return report
    refuse_unsafe(storage)  # before the work
    basis, reduced_by, counted = source.basis, None, progress
    if dims is not None:
        basis = reduced_by = principal_components(snapshot, dims, threads=threads, progress=_part(progress, 0))
        counted = _part(progress, 1)
    changes: dict[str, object] = {"dtype": dtype, "store_id": ""}
    if basis is not None:
        changes |= {"dim": basis.dim, "reduction": write_basis(storage, basis)}
    info = snapshot.info.model_copy(update=changes)
    threads = threads or min(_THREADS, len(os.sched_getaffinity(0)))
    commit = Commit(
        storage=storage,
        info=info,
        operation=f"remake of snapshot {snapshot.version} ({snapshot.manifest.commit_id})",
        entries=_write_shards(snapshot, storage, info, reduced_by, threads, counted),
        only_after=0,
    )
    staging.add(storage, source.quarantine_rows())
    new = Snapshot(storage, info, commit.manifest_after(log.EMPTY))
    report = _report(source.url, snapshot, new, reduced_by)
    storage.write_bytes(REPORT, seal(report))
    FeatureStore.open_or_create(storage.url, info)
    commit.publish()
    return report


def read_report(storage: Storage) -> RemakeReport | None:
    """Read the report of the remake that made the store at this place, if one did. Raises CorruptFileError."""
    try:
        return read_sealed(storage, REPORT, RemakeReport)
    except FileNotFoundError:
        return None


def _part(progress: Progress | None, reading: int) -> Progress | None:
    """Return a callback that counts shards of the first of two readings (0), or of the second (1)."""
    return None if progress is None else lambda done, total: progress(reading * total + done, 2 * total)


def _finished(
    source: FeatureStore, snapshot: Snapshot, storage: Storage, dims: int | None, dtype: DType
) -> RemakeReport | None:
    """Return the report of the store that is there, if the same remake made it; None where there is no store.

    Raises StoreExistsError where another store is there, or where the place is that of the source, or inside it.
    """
    if storage.url == source.url:
        raise StoreExistsError(Problem.IS_THE_SOURCE, storage.url)
    if storage.url.startswith(f"{source.url.rstrip('/')}/"):  # what cleans the source up would find it
        raise StoreExistsError(Problem.INSIDE_THE_SOURCE, storage.url)
    try:
        made = FeatureStore.open(storage.url)
    except StoreNotFoundError:
        return None
    report, first = read_report(storage), log.find(storage, 1)
    # Where another writer's commit was first, the report is of rows that are not there.
    if report is not None and (first is None or first.commit_id == report.commit_id):
        made_dims = None if report.variance_kept is None else report.dim
        asked = snapshot.manifest.commit_id, dims, dtype
        if asked == (report.source_commit_id, made_dims, report.dtype):
            return report if made.snapshot().version else None  # none if it was killed right before its commit
        rows = report.source_version, report.source, _described(made.info)
        raise StoreExistsError(Problem.OTHER_ROWS_IN_THE_WAY, storage.url, *rows)
    raise StoreExistsError(Problem.STORE_IN_THE_WAY, storage.url)


def _write_shards(
    snapshot: Snapshot, storage: Storage, info: StoreInfo, basis: Basis | None, threads: int, progress: Progress | None
) -> dict[int, list[FileEntry]]:
    """Write the live rows of all shards as files of the new store. Raises InvalidRowsError, CorruptFileError."""

    def write_shard(shard: int) -> list[FileEntry]:
        reader = snapshot.shard_reader(shard)
        if not reader.num_rows:
            return []
        return [write_shard_file(storage, info, shard, _encoded_blocks(reader, snapshot, info, basis), "base", 0)]

    shards = sorted(snapshot.manifest.shards)
    written = zip(shards, in_threads(write_shard, shards, threads, progress), strict=True)
    return {shard: entries for shard, entries in written if entries}


def _encoded_blocks(
    reader: ShardReader, snapshot: Snapshot, info: StoreInfo, basis: Basis | None
) -> Iterator[pa.Table]:
    """Yield the live rows of a shard as the new store keeps them."""
    codec = Codec(info.dtype)
    for block in merged_blocks(reader):
        values_ND = snapshot.codec.decode(matrix_of(block, reader.info))
        bits, storable_N = codec.encode_storable(values_ND if basis is None else basis.project(values_ND))
        if not storable_N.all():
            uri = block[URI][int(np.flatnonzero(~storable_N)[0])]
            raise InvalidRowsError(Problem.BEYOND_DTYPE, uri, info.dtype)
        yield live_table(block, bits, info)


def _described(info: StoreInfo) -> str:
    """Describe the form of a store's rows, e.g. 'bfloat16, 256 of 4,096 numbers'."""
    return f"{info.dtype}, {info.width_text} numbers" if info.reduction else info.dtype


def _report(source: str, snapshot: Snapshot, new: Snapshot, basis: Basis | None) -> RemakeReport:
    """Compare rows that are read back from the new store."""
    keys_N, exact_ND = sample(snapshot, _COMPARED_ROWS, _COMPARED_SEED)
    kept_ND = new.codec.decode(new.get(keys_N))
    return RemakeReport(
        source=source,
        source_version=snapshot.version,
        source_commit_id=snapshot.manifest.commit_id,
        source_dtype=snapshot.info.dtype,
        commit_id=new.manifest.commit_id,
        dtype=new.info.dtype,
        source_dim=snapshot.info.dim,
        dim=new.info.dim,
        basis_sha256=None if new.info.reduction is None else new.info.reduction.sha256,
        variance_kept=None if basis is None else basis.variance_kept,
        num_rows=new.manifest.file_rows,
        source_bytes=snapshot.manifest.file_bytes,
        bytes=new.manifest.file_bytes,
        row_bytes_share=new.info.row_bytes / snapshot.info.row_bytes,
        accuracy=measure_accuracy(exact_ND, kept_ND if basis is None else basis.restored(kept_ND)),
    )


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


def measure_accuracy(exact_ND: Float32Array, kept_ND: Float32Array) -> Accuracy:
    """Compare rows before and after, in the same order; at most a tenth ask for their neighbours among the others.

    Rows of zeros have no relative error. Cost: K x N x D multiplications, twice.
    """
    length_N = np.linalg.norm(exact_ND, axis=1)
    is_compared_N = length_N > 0
    error_N = (np.linalg.norm(exact_ND - kept_ND, axis=1) / np.where(is_compared_N, length_N, 1))[is_compared_N]
    num_queries = min(_MOST_QUERIES, len(exact_ND) // 10)
    enough = bool(len(error_N))
    return Accuracy(
        num_compared=len(exact_ND),
        num_queries=num_queries,
        relative_error_mean=float(error_N.mean()) if enough else None,
        relative_error_p99=float(np.percentile(error_N, 99)) if enough else None,
        recall_at_10=_recall(exact_ND, kept_ND, num_queries) if len(exact_ND) > 2 * _NUM_NEIGHBOURS else None,
    )


def _recall(exact_ND: AnyArray, kept_ND: AnyArray, num_queries: int) -> float:
    """Return the share of neighbours that are kept. Queries are the first rows: no row is its own neighbour."""
    wanted_KN, found_KN = (
        nearest(rows[num_queries:], rows[:num_queries], _NUM_NEIGHBOURS) for rows in (exact_ND, kept_ND)
    )
    hits = [len(np.intersect1d(wanted, found)) for wanted, found in zip(wanted_KN, found_KN, strict=True)]
    return float(np.mean(hits)) / _NUM_NEIGHBOURS


def principal_components(
    snapshot: Snapshot, dims: int, *, threads: int | None = None, progress: Progress | None = None
) -> Basis:
    """Find the `dims` principal components of all live rows of `snapshot`.

    Reads every row once, a few megabytes at a time, and holds one float64 (D, D) and the K x D result: .5 GB at
    D = 8,192. Cost: N x D x D multiplications, and about 2 D^3 at the end. Raises InvalidRowsError where the rows vary
    in fewer directions, or hold a number that is not finite.
    """
    info, url = snapshot.info, snapshot.storage.url
    if not 1 <= dims <= info.dim:
        raise DimsError(Problem.TOO_MANY_DIMS, dims, url, info.dim)
    num_rows = snapshot.num_rows
    if dims >= num_rows:
        raise InvalidRowsError(Problem.TOO_FEW_ROWS, dims, snapshot.version, url, num_rows, max(0, num_rows - 1))
    shards = sorted(snapshot.manifest.shards)
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        moments = CoMoments(info.dim, pool)
        for number, shard in enumerate(shards, start=1):
            reader = snapshot.shard_reader(shard)
            for block in merged_blocks(reader):
                values_ND = snapshot.codec.decode(matrix_of(block, info))
                if not np.isfinite(values_ND).all():
                    raise InvalidRowsError(Problem.SHARD_NOT_FINITE, shard, url)
                moments.add(values_ND)
            if progress is not None:
                progress(number, len(shards))
        total_variance = moments.total_variance()
        spectrum_K, components_KD = moments.components(dims)
    rank = int(np.count_nonzero(spectrum_K > info.dim * np.finfo(np.float64).eps * spectrum_K[0]))
    if rank < dims:
        raise InvalidRowsError(Problem.TOO_FEW_DIRECTIONS, dims, url, rank)
    origin = BasisOrigin(
        store_id=info.store_id,
        version=snapshot.version,
        commit_id=snapshot.manifest.commit_id,
        extractor=info.extractor,
        num_rows=moments.count,
        total_variance=total_variance,
    )
    return Basis(moments.mean_D, components_KD, spectrum_K, origin)


class CoMoments:
    """Count, mean and co-moments (sums of products of distances from the mean) of rows that are added block by block.

    Its products run in `pool`; the caller holds BLAS to one thread each, so that sums have one order.
    """

    def __init__(self, dim: int, pool: ThreadPoolExecutor) -> None:
        self.count = 0
        self.mean_D: Float64Array = np.zeros(dim)
        self._comoment_DD: Float64Array = np.zeros((dim, dim))  # panels on and above the diagonal alone
        edges = [*range(0, dim, _PANEL), dim]
        columns = [slice(first, end) for first, end in itertools.pairwise(edges)]
        self._panels = list(itertools.combinations_with_replacement(columns, 2))
        self._pool = pool

    def add(self, values_ND: FloatArray) -> None:
        """Merge a block of rows."""
        if not len(values_ND):
            return
        rows = np.empty((len(values_ND) + 1, len(self.mean_D)))
        mean_D = values_ND.mean(axis=0, dtype=np.float64)
        np.subtract(values_ND, mean_D, out=rows[:-1])
        count = self.count + len(values_ND)
        delta_D = mean_D - self.mean_D
        # What the distance of the two means adds is one more row of the product.
        rows[-1] = delta_D * np.sqrt(self.count * (len(values_ND) / count))

        def multiply(panel: tuple[slice, slice]) -> None:
            self._comoment_DD[panel] += rows[:, panel[0]].T @ rows[:, panel[1]]

        list(self._pool.map(multiply, self._panels))
        self.mean_D = self.mean_D + delta_D * (len(values_ND) / count)
        self.count = count

    def total_variance(self) -> float:
        """Return the sum of all variances (of the population)."""
        return float(np.trace(self._comoment_DD)) / max(1, self.count)

    def components(self, dims: int) -> tuple[Float64Array, Float64Array]:
        """Return the largest variances, (K,), and their directions, (K, D), as `Basis` has them.

        It uses up the co-moments: nothing can be added after it.
        """
        dim = len(self.mean_D)
        # Transposed, the memory is in LAPACK's order and what is above the diagonal is below it: nothing is copied.
        values_K, vectors_DK = linalg.eigh(
            self._comoment_DD.T,
            lower=True,
            subset_by_index=(dim - dims, dim - 1),
            driver="evr",
            overwrite_a=True,
            check_finite=False,
        )
        spectrum_K = np.maximum(values_K[::-1], 0) / max(1, self.count)
        components_KD = np.ascontiguousarray(vectors_DK.T[::-1])
        largest_K = np.abs(components_KD).argmax(axis=1)
        components_KD *= np.sign(components_KD[np.arange(dims), largest_K])[:, None]
        return spectrum_K, components_KD
