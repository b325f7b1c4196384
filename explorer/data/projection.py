"""Projection of vectors to the plane: principal components at once, UMAP in a process of its own, with a fixed seed.

UMAP's compiler takes half a minute and holds Python's lock for much of it, so it must not run in a server's threads.

Letters of shapes: N images, V width of their vectors.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from explorer.errors import ExplorerError

Vectors = NDArray[np.float32]
Plane = NDArray[np.float32]
LEAST_FOR_UMAP = 20
"""Fewest images for UMAP: fewer have no neighbourhoods to preserve."""
NEIGHBOURS, SEED = 15, 0
_LOOK_S = 0.2
_STEPS = ("loads UMAP", "finds neighbours and lays them out")


def principal(vectors_NV: Vectors) -> Plane:
    """Project on the two directions of most variance, (N, 2): some milliseconds for thousands."""
    if len(vectors_NV) < 2 or vectors_NV.shape[1] < 2:
        return np.concatenate([vectors_NV[:, :1], np.zeros((len(vectors_NV), 1), np.float32)], axis=1)
    from sklearn.decomposition import PCA

    plane_N2: Plane = PCA(2, svd_solver="covariance_eigh").fit_transform(vectors_NV).astype(np.float32)
    return plane_N2


def umap_in_process(vectors_NV: Vectors, tell: Callable[[str], None]) -> Plane:
    """Project by UMAP in another process, (N, 2): about a minute for 20,000 images.

    `tell` is called often with the progress; an error that it raises ends the process. Raises ExplorerError if UMAP
    fails.
    """
    with tempfile.TemporaryDirectory(prefix="explorer-map-") as folder:
        np.save(Path(folder) / "in.npy", vectors_NV)
        with (Path(folder) / "log").open("wb") as log:
            command = [sys.executable, "-m", "explorer.data.projection", folder]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        begun_s = time.monotonic()
        try:
            while process.poll() is None:
                step = _STEPS[(Path(folder) / "loaded").exists()]
                tell(f"{step}, {time.monotonic() - begun_s:.0f} s")
                time.sleep(_LOOK_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
        if process.returncode != 0:
            last = (Path(folder) / "log").read_text(errors="replace").strip().splitlines()[-1:]
            raise ExplorerError(f"UMAP ended with {process.returncode}: {''.join(last)[:300]}")
        plane_N2: Plane = np.load(Path(folder) / "out.npy")
        return plane_N2


def _project(folder: Path) -> None:
    """Run the projection in the process: in.npy to out.npy."""
    vectors_NV = np.load(folder / "in.npy")
    import umap

    (folder / "loaded").touch()
    neighbours = min(NEIGHBOURS, len(vectors_NV) - 1)
    reducer = umap.UMAP(n_neighbors=neighbours, init="pca", random_state=SEED, n_jobs=1)
    np.save(folder / "out.npy", reducer.fit_transform(vectors_NV).astype(np.float32))


if __name__ == "__main__":
    _project(Path(sys.argv[1]))
