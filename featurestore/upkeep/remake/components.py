"""Principal components of a snapshot's rows, streamed: exact, in float64, the same bits at any number of threads.

Letters of shapes: N rows of a block, D feature width, K components.

Source of the merge: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm", 1979. Blocks are merged in
the order of shards and rows, so neither compaction nor the number of files changes a bit.
"""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import linalg
from threadpoolctl import threadpool_limits

from featurestore.errors import DimsError, InvalidRowsError
from featurestore.format.basis import Basis, BasisOrigin, Float64Array
from featurestore.format.datafile import URI, matrix_of
from featurestore.snapshot import Snapshot
from featurestore.storage.threads import Progress
from featurestore.upkeep.compaction import merged_blocks

_PANEL = 512  # columns of a product; its numbers are summed in the same order wherever they are computed


def principal_components(
    snapshot: Snapshot, dims: int, *, threads: int | None = None, progress: Progress | None = None
) -> Basis:
    """Find the `dims` principal components of all live rows of `snapshot`.

    Reads every row once, a few megabytes at a time, and holds one float64 (D, D) and the K x D result: .5 GB at
    D = 8,192. Cost: N x D x D multiplications, and about 2 D^3 at the end. Raises InvalidRowsError where the rows vary
    in fewer directions, or hold a number that is not finite.
    """
    info = snapshot.info
    if not 1 <= dims <= info.dim:
        raise DimsError(f"dims={dims}: {snapshot.storage.url} has rows of {info.dim} numbers; choose 1 to {info.dim}")
    num_rows = snapshot.num_rows
    if dims >= num_rows:
        raise InvalidRowsError(
            f"dims={dims}: snapshot {snapshot.version} of {snapshot.storage.url} has {num_rows} rows, which vary in"
            f" {max(0, num_rows - 1)} directions at most: choose fewer dims, or add rows"
        )
    shards = sorted(snapshot.manifest.shards)
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        moments = CoMoments(info.dim, pool)
        for number, shard in enumerate(shards, start=1):
            reader = snapshot.shard_reader(shard)
            for block in merged_blocks(reader):
                values_ND = snapshot.codec.decode(matrix_of(block, info))
                _check_finite(values_ND, block, snapshot.storage.url)
                moments.add(values_ND)
            if progress is not None:
                progress(number, len(shards))
        total_variance = moments.total_variance()
        spectrum_K, components_KD = moments.components(dims)
    rank = int(np.count_nonzero(spectrum_K > info.dim * np.finfo(np.float64).eps * spectrum_K[0]))
    if not rank:
        raise InvalidRowsError(f"all rows of {snapshot.storage.url} are equal: there is nothing to reduce")
    if rank < dims:
        raise InvalidRowsError(
            f"dims={dims}: the rows of {snapshot.storage.url} vary in {rank} directions alone; choose up to {rank}"
        )
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

    def add(self, values_ND: npt.NDArray[np.floating]) -> None:
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


def _check_finite(values_ND: npt.NDArray[np.float32], block: pa.Table, url: str) -> None:
    finite_N = np.isfinite(values_ND).all(axis=1)
    if not finite_N.all():
        first = block[URI][int(np.flatnonzero(~finite_N)[0])]
        raise InvalidRowsError(
            f"{first} in {url} has numbers that are not finite: no store should hold such a row; delete its key, or"
            " extract it again"
        )
