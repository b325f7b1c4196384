"""The rows of one run, the store that holds them, and what the measurements of it share.

Letters of shapes: N rows, U keys asked at once, D feature width.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from featurestore import ExtractorSpec, FeatureRows, FeatureStore, StoreInfo, to_bits

DIM = 4096
NUM_DELTAS = 10
DELTA_SHARE = 0.01
_PART_ROWS = 4096
EXTRACTOR = ExtractorSpec(
    backbone="drawn", layer="none", weights_digest="none", preprocessing="none", compute_dtype="bfloat16"
)

Matrix = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Held:
    """Rows in memory and the snapshot of a store that holds them."""

    store: FeatureStore
    version: int
    keys_N: npt.NDArray[np.int64]
    matrix_ND: Matrix


@dataclass
class Bench:
    """The size of one run, and where its files lie."""

    folder: Path
    num_rows: int
    num_keys: int
    rounds: int
    progress: Progress
    seed: int
    changed: dict[int, int] = field(default_factory=dict)  # row that a delta replaced: the row whose feature it has now

    def make_store(self) -> Held:
        """Draw rows (half of the numbers are 0, as after a ReLU) and write them as the extractor does; one snapshot."""
        rng = np.random.default_rng(self.seed)
        info = StoreInfo(dim=DIM, extractor=EXTRACTOR)
        store = FeatureStore.create(self.folder / "store", info)
        matrix_ND = np.empty((self.num_rows, DIM), np.uint16)
        keys = []
        starts = range(0, self.num_rows, _PART_ROWS)
        for start in self.progress.track(starts, description="draw and stage rows"):
            count = min(_PART_ROWS, self.num_rows - start)
            values = np.maximum(rng.standard_normal((count, DIM), dtype=np.float32), 0)
            rows = FeatureRows.of(uris_of(range(start, start + count)), to_bits(values, "bfloat16"))
            store.stage_part("bench", f"{start:09d}", rows)
            matrix_ND[start : start + count] = rows.features_ND
            keys.append(rows.keys_N)
        parts = store.staged_parts("bench")
        shards = range(info.num_shards)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            built = pool.map(lambda shard: store.build_shards("bench", range(shard, shard + 1), parts), shards)
            shown = self.progress.track(built, total=len(shards), description="build shards")
            entries = {shard: entry for each in shown for shard, entry in each.items()}
        snapshot = store.commit(entries, "extract")
        store.discard_staging("bench")
        return Held(store, snapshot.version, np.concatenate(keys), matrix_ND)

    def add_deltas(self, held: Held) -> int:
        """Commit deltas over the store, each of other rows; a changed row gets the feature of another. The version.

        `changed` says which: so the rows of the newest snapshot need no second matrix.
        """
        rng = np.random.default_rng(self.seed + 1)
        size = max(1, int(self.num_rows * DELTA_SHARE))
        rows_K = rng.permutation(self.num_rows)[: NUM_DELTAS * size]
        sources_K = rng.integers(0, self.num_rows, len(rows_K))
        self.changed = dict(zip(rows_K.tolist(), sources_K.tolist(), strict=True))
        version = held.version
        for start in self.progress.track(range(0, len(rows_K), size), description="commit deltas"):
            delta = slice(start, start + size)
            rows = FeatureRows.of(uris_of(rows_K[delta]), held.matrix_ND[sources_K[delta]])
            version = held.store.put(rows).version
        return version

    def sources_of(self, index_U: Indices) -> Indices:
        """Return whose feature each row has in the newest snapshot."""
        return np.array([self.changed.get(row, row) for row in index_U.tolist()], np.int64)


def uris_of(rows: Any) -> list[str]:
    """Name rows by their numbers."""
    return [f"{row}.jpg" for row in rows]


def check_equal(found: Matrix, expected: Matrix, who: str) -> None:
    """Check that two answers are equal: a fast wrong answer is no figure."""
    if not np.array_equal(found, expected):
        raise AssertionError(f"{who} gave other rows than the matrix")
