"""Open trained runs, at most two; one thread uses them at a time.

Images are looked up in the snapshots that the run was trained on, as in crossmedia score and evaluations, so that
scores are equal. Memory of an open run: its ID tables and E; the features are mapped from local files.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from threading import RLock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from explorer.data.cache import LruCache
from explorer.data.runs.folders import RunSummary, open_run, trained_runs
from explorer.errors import ExplorerError
from explorer.places import Places
from explorer.problems import Problem
from featurestore.published.paths import RunPath
from trainer.config import load_saved
from trainer.errors import DataError

if TYPE_CHECKING:
    from trainer.models.pooling import PairWeights
    from trainer.runs.saved import TrainedRun
    from trainer.samples.index import SampleIndex
    from trainer.samples.reader import Batch
    from trainer.schema.fields import Schema


Logits = NDArray[np.float64]
_MOST_OPEN, _MOST_KEPT = 2, 8


At = Literal["trained", "newest"]
"""A snapshot of a run's feature stores: that of the training, or the newest."""


@dataclass
class OpenedRun:
    """An open trained run with its test impressions."""

    name: str
    digest: str
    """Digest of the checkpoint."""
    trained: "TrainedRun"
    index: "SampleIndex"
    at: "At"
    """The snapshot that images are looked up in."""
    kept: dict[str, Any] = field(default_factory=dict)
    """Results computed by the run; kept after it is closed."""

    @property
    def schema(self) -> "Schema":
        """The schema of the run's samples."""
        return self.trained.schema

    @property
    def missing(self) -> str:
        """The run's policy for an image without a feature: `zeros` or `learned`."""
        return self.trained.config.data.missing

    @property
    def knows_missing(self) -> bool:
        """Whether training showed the model missing images often enough, or a set share of ads without theirs."""
        return bool(self.trained.saved.met_missing_often or self.trained.config.model.image_dropout)

    @property
    def sees_images(self) -> bool:
        """Whether the model reads any content."""
        return bool(self.trained.partitions)

    def texts(self, values: Iterable[Any]) -> list[str]:
        """Write IDs as people know them: a hash as the text that it was made of, where run or samples have it."""
        written = list(values)
        found = self.trained.saved.texts_of({each for each in written if isinstance(each, int)}, self.index.storage)
        return [found.get(each, str(each)) for each in written]

    def logits(self, batch: "Batch") -> Logits:
        """Predict the samples of a batch (B,), by the very calls of an evaluation."""
        engine = self.trained.engine
        return engine.predict(engine.prepare(batch, "eval"))

    def logits_without_images(self, batch: "Batch") -> Logits:
        """Predict as if no image had a feature.

        Each feature is replaced by `zeros` or the trained vector. IDs of images stay.
        """
        partitions = self.trained.partitions.values()
        try:
            for partition in partitions:
                partition.hide(True)
            return self.logits(batch)
        finally:
            for partition in partitions:
                partition.hide(False)

    def weights(self, batch: "Batch") -> dict[str, "PairWeights"]:
        """Predict a batch, and note how the model's aggregators weigh the behaviours of its samples, by field.

        Fields whose aggregator has no weights (sum, mean, max, concat) have no entry. Costs a second pass of the
        aggregators.
        """
        import torch

        found: dict[str, PairWeights] = {}

        def note(name: str, aggregator: Any, arguments: tuple[Any, ...]) -> None:
            with torch.no_grad():
                weights = aggregator.weights(*arguments)
            if weights is not None:
                found[name] = weights

        aggregators = self.trained.engine.model.aggregators.items()
        hooks = [each.register_forward_pre_hook(partial(note, name)) for name, each in aggregators]
        try:
            self.logits(batch)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def close(self) -> None:
        """Release the stores' rows and the tables, also where a page that was shown still refers to this run."""
        self.trained.close()
        del self.trained.engine


class TrainedRuns:
    """The runs in a folder, opened on demand; those used last stay open."""

    def __init__(self, places: Places) -> None:
        self._places, self._lock = places, RLock()
        self._opened: LruCache[OpenedRun] = LruCache(_MOST_OPEN, close=OpenedRun.close)
        self._kept: LruCache[dict[str, Any]] = LruCache(_MOST_KEPT)

    def names(self) -> list[RunSummary]:
        """List the runs with a checkpoint, without days of trainer.daily, those first that see most images."""
        return [run for run in trained_runs(self._places) if "/" not in run.name]

    def is_open(self, name: str, at: At = "trained") -> bool:
        """Return whether the run is open already."""
        return self._opened.peek((name, at)) is not None

    def is_listed(self, name: str) -> bool:
        """Return whether the run's impressions have been scored."""
        opened = self._opened.peek((name, "trained"))
        return opened is not None and "scored" in opened.kept

    @contextlib.contextmanager
    def use(self, name: str, at: At = "trained") -> Iterator[OpenedRun]:
        """Open a run, or reuse the open one, for this thread alone until the end of the block.

        A run with a newer checkpoint is opened again. Raises NotHereError if it is not a run, TrainerError,
        FeatureStoreError.
        """
        folder = open_run(self._places, name)
        with self._lock:
            digest = _digest_of(folder, name)
            known = self._opened.peek((name, at))
            if known is not None and known.digest != digest:
                self._opened.discard((name, at))
            try:
                yield self._opened.get((name, at), lambda: self._open(folder, name, at))
            except DataError:  # the samples may have changed: the next call opens it again
                self._opened.discard((name, at))
                self._kept = LruCache(_MOST_KEPT)
                raise

    def close(self) -> None:
        """Close all runs."""
        with self._lock:
            self._opened.clear()

    def _open(self, folder: RunPath, name: str, at: At) -> OpenedRun:
        from trainer.comm import SoloComm
        from trainer.runs.saved import open_test, open_trained

        self._places.check_net(load_saved(folder / "config.yaml").model.base)
        comm = SoloComm()
        trained = open_trained(
            folder,
            comm,
            samples=self._places.samples,
            as_trained=at == "trained",
            store=self._places.store_for(load_saved(folder / "config.yaml").data.store),
            device="cpu",
        )
        try:
            index = open_test(comm, trained.config, trained.schema, self._places.samples)
        except BaseException:
            trained.close()
            raise
        digest = trained.saved.digest
        kept = self._kept.get((name, at, digest, index.layout_digest), dict)
        return OpenedRun(name, digest, trained, index, at, kept)


def _digest_of(folder: RunPath, name: str) -> str:
    """Return the digest of the run's newest checkpoint. Raises ExplorerError, TrainerError."""
    from trainer.runs.saved import read_run

    try:
        return read_run(folder).digest
    except OSError as error:
        raise ExplorerError(Problem.UNREADABLE_RUN, name[:60], error.strerror) from error
