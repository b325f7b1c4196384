"""Visual vectors of all images of a store by a checkpoint of a run: computed once, cached on disk.

The cache has one folder for each checkpoint and snapshot, which is mapped into memory: a million images of 12 numbers
are a file of 48 MB, of which only the pages that are read are in memory. The cache may be deleted at any time.

Letters of shapes: N images, V visual width.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from explorer.data.cache import FileCache
from featurestore.keys import Int64Array
from featurestore.published.paths import RunPath

if TYPE_CHECKING:
    from trainer.runs.export import ImageNetwork

Progress = Callable[[int, int], None]
"""Receives the number done, and the total."""

_VECTORS, _KEYS, _URIS, _ABOUT = "vectors.npy", "keys.npy", "uris.arrow", "about.json"
_LOCK = Lock()
_FOLDERS = FileCache("vectors-", "", most=16)
"""One for each of the checkpoints used last."""


@dataclass(frozen=True)
class VisualVectors:
    """Visual vectors of all images of a snapshot, mapped from files; row n of all three is the same image."""

    keys_N: Int64Array
    vectors_NV: NDArray[np.float32]
    uris_N: Any
    """A chunked array of texts."""
    about: dict[str, Any]
    """Run, checkpoint and its digest, network, width, store, snapshot and their ids."""
    digest: str
    """Digest of checkpoint, network and snapshot, which identifies the vectors."""

    def row_of(self, key: int) -> int | None:
        """Find the row of an image, or return None. Reads the keys, 8 MB for a million."""
        rows = np.flatnonzero(self.keys_N == key)
        return int(rows[0]) if len(rows) else None

    def uri(self, row: int) -> str:
        """Return the uri of the image in a row."""
        return str(self.uris_N[row].as_py())


def visual_vectors(
    run: RunPath,
    *,
    store: str | None = None,
    which: str | None = None,
    network: str | None = None,
    store_version: int | None = None,
    cache: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> VisualVectors:
    """Compute the visual vectors of all images, or open the cached ones; `progress` counts images.

    `store`: current address of the run's store; `which`: a checkpoint, by default the newest; `network`: which E, if a
    run has several; `store_version`: by default the newest. Cost: about 10 s for 100,000 images on a core, or some
    milliseconds from the cache. Raises TrainerError (a run without images or without a checkpoint), FeatureStoreError.
    """
    from trainer.runs.export import open_network

    found = open_network(run, which=which, network=network, store_version=store_version, store=store)
    digest = digest_of(found)
    place = _FOLDERS.path(digest, cache)
    with _LOCK:
        if (opened := _opened(place, digest)) is None:
            _compute(found, place, progress)
            opened = _opened(place, digest)
            assert opened is not None
            _FOLDERS.prune(cache)
    return opened


def digest_of(found: "ImageNetwork") -> str:
    """Return a digest of the inputs of vectors: the checkpoint, the network and the commit of the snapshot."""
    commit = found.snapshot.info.store_id, found.snapshot.manifest.commit_id, found.snapshot.version
    values = json.dumps([found.saved.digest, found.store, found.name, *commit])
    return hashlib.sha256(values.encode()).hexdigest()[:24]


def _opened(place: Path, digest: str) -> VisualVectors | None:
    if not place.is_dir():
        return None
    with contextlib.suppress(OSError):
        os.utime(place)
    uris = pa.ipc.open_file(pa.memory_map(str(place / _URIS))).read_all().column(0)
    return VisualVectors(
        keys_N=np.load(place / _KEYS, mmap_mode="r"),
        vectors_NV=np.load(place / _VECTORS, mmap_mode="r"),
        uris_N=uris,
        about=json.loads((place / _ABOUT).read_bytes()),
        digest=digest,
    )


def _compute(network: "ImageNetwork", place: Path, progress: Progress) -> None:
    """Write the vectors into a folder that is renamed when it is complete."""
    from featurestore.format.datafile import KEY, URI
    from trainer.runs.export import VECTOR

    rows, width = network.num_images, network.width
    part = Path(tempfile.mkdtemp(prefix=".tmp-", dir=place.parent))
    try:
        keys_N = np.lib.format.open_memmap(part / _KEYS, "w+", np.int64, (rows,))
        vectors_NV = np.lib.format.open_memmap(part / _VECTORS, "w+", np.float32, (rows, width))
        schema, done = pa.schema([pa.field(URI, pa.large_string())]), 0
        with pa.OSFile(str(part / _URIS), "wb") as file, pa.ipc.new_file(file, schema) as uris:
            for table in network.tables():
                end = done + len(table)
                keys_N[done:end] = table[KEY].to_numpy()
                numbers: Any = table[VECTOR].combine_chunks()
                vectors_NV[done:end] = numbers.flatten().to_numpy().reshape(-1, width)
                uris.write_table(table.select([URI]).cast(schema))
                done = end
                progress(done, rows)
        assert done == rows
        keys_N.flush()
        vectors_NV.flush()
        (part / _ABOUT).write_text(json.dumps(network.describe()))
        with contextlib.suppress(OSError):  # another process has computed the same
            part.rename(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)
