"""Measures how far logits move on a bundle's sample: by the type of its ID rows, or by a publish of vectors."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.keys import Int64Array
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from serving.bundle import SAMPLE_GROUPS
from serving.bundle.idrows import BundleIdRows, Float32
from serving.bundle.manifest import SAMPLE, BundleManifest, LogitDrift
from serving.bundle.open import Bundle
from serving.bundle.publish import PublishReport
from serving.bundle.vectors import VectorTable
from serving.bundle.writerows import SavedTables, rows_at
from serving.scoring.arrow import scorable_rows
from serving.scoring.columns import RequestColumns
from serving.scoring.request import Request
from serving.scoring.scorer import Scorer
from trainer.runs.saved import SavedRun
from trainer.samples.columns import Rule
from trainer.schema import Side

_DRAWN_VALUES = 8
_DRAWN_IDS = 1 << 40


def id_rows_drift(saved: SavedRun, draft: BundleManifest, storage: Storage) -> LogitDrift:
    """Measure how far the written ID rows of a version move logits, compared to the checkpoint's rows.

    Uses the version's sample, or random requests if it has none. Reads the run's ID tables once. Raises
    BrokenBundleError, CheckpointError, TrainerError."""
    bundle = _with_vectors(Bundle(storage, draft, None, verify=False), {})
    has_sample = draft.file(SAMPLE) is not None
    sample = _sample_of(bundle) if has_sample else drawn_requests(Scorer(bundle).columns)
    asking = _NotedRows(bundle.ids)
    bundle.ids = asking
    as_written = _logits(bundle, sample)
    asked = {width: np.unique(np.concatenate(places)) for width, places in asking.asked.items()}
    bundle = copy.copy(bundle)
    bundle.ids = _GivenRows(bundle.ids, asked, rows_at(SavedTables(saved), asked))
    error = _error(as_written, _logits(bundle, sample))
    return error if has_sample else error.model_copy(update={"inputs": "drawn ids"})


def publish_drift(bundle: Bundle, reports: Sequence[PublishReport]) -> LogitDrift | None:
    """Measure how far a publish has moved logits; None if the bundle has no sample. `bundle`: without vectors.

    Reads only the vectors of the sample's images from the snapshots' files. Raises BrokenBundleError,
    SnapshotNotFoundError, StorageError."""
    if bundle.manifest.file(SAMPLE) is None:
        return None
    sample, _ = _sample_of(bundle), bundle.network  # loaded once for both
    before = _with_vectors(bundle, {each.store: each.before for each in reports})
    after = _with_vectors(bundle, {each.store: each.snapshot for each in reports})
    return _error(_logits(before, sample), _logits(after, sample))


class _NotedRows(BundleIdRows):
    """The same rows; records which rows are gathered, by width."""

    def __init__(self, rows: BundleIdRows) -> None:
        self.__dict__.update(rows.__dict__)
        self.asked: dict[int, list[Int64Array]] = {}

    def gather(self, width: int, rows_N: Int64Array) -> Float32:
        self.asked.setdefault(width, []).append(rows_N)
        return super().gather(width, rows_N)


class _GivenRows(BundleIdRows):
    """The same rows with replaced values: those of the ascending positions (U,), by width."""

    def __init__(self, rows: BundleIdRows, places: dict[int, Int64Array], values: dict[int, Float32]) -> None:
        self.__dict__.update(rows.__dict__)
        self._places, self._values = places, values

    def gather(self, width: int, rows_N: Int64Array) -> Float32:
        return self._values[width][np.searchsorted(self._places[width], rows_N)]


def _with_vectors(bundle: Bundle, snapshots: dict[str, int]) -> Bundle:
    """Open the bundle with these snapshots of its vectors, the newest ones by default, for a few lookups."""
    other = copy.copy(bundle)
    other.vectors = {
        of.store: VectorTable.of_snapshot(
            of, FeatureStore.open(bundle.vectors_url(of)).snapshot(snapshots.get(of.store))
        )
        for of in bundle.manifest.vectors
    }
    return other


def _sample_of(bundle: Bundle) -> pa.Table:
    return scorable_rows(RequestColumns(bundle.schema, bundle.fields), pq.read_table(bundle.files.path(SAMPLE)))


def drawn_requests(columns: Mapping[str, Rule]) -> list[Request]:
    """Draw SAMPLE_GROUPS requests with these columns, 8 candidates and behaviours each.

    Ids are random, numbers are normally distributed; the requests are the same every time.
    """
    random = np.random.default_rng(0)

    def values(rule: Rule, *shape: int) -> Any:
        if rule.is_real:
            return random.normal(size=shape).tolist()
        return random.integers(0, _DRAWN_IDS, shape).tolist()

    def column(rule: Rule) -> Any:
        inner = rule.width or 1
        if rule.depth == 0:
            return values(rule)
        if rule.side == "user" and rule.depth == 1 and rule.width is not None:
            return values(rule, inner)
        return values(rule, _DRAWN_VALUES, *[inner] * (rule.depth - 1))

    def of_side(side: Side) -> dict[str, Any]:
        return {name: column(rule) for name, rule in columns.items() if rule.side == side}

    return [Request(user=of_side("user"), candidates=of_side("ad")) for _ in range(SAMPLE_GROUPS)]


def _logits(bundle: Bundle, sample: pa.Table | list[Request]) -> Float32:
    scorer = Scorer(bundle)
    scored = scorer.score(sample) if isinstance(sample, list) else scorer.score_table(sample)
    return np.concatenate([each.logits_C for each in scored])


def _error(one: Float32, other: Float32) -> LogitDrift:
    moved: Any = np.abs(one.astype(np.float64) - other)
    return LogitDrift(num_scores=len(moved), worst=float(moved.max()), mean=float(moved.mean()))
