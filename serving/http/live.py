"""The model in use, its warm-up, and the switch to a newer one while requests continue.

A thread polls every few seconds for another version in use and for newer vectors, loads that model while the old one
answers, and warms it up; then the event loop switches to it. A body that is being scored at this moment keeps the old
model open (`held`) until its last piece. A version that cannot be loaded, or fails its warm-up, is refused: the old one
stays in use, and the new one is tried again later.

The warm-up scores the bundle's own sample. It is also the last check of a new version: these scores must be finite
numbers. A bundle without a sample (`--sample-groups 0`) is neither warmed up nor checked.
"""

import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from featurestore.console.memory import return_freed_memory
from serving.bundle.log import BundleIdentity
from serving.errors import BrokenBundleError, NotFiniteError
from serving.http.access import logger
from serving.http.limits import AGAIN, RefusedError
from serving.http.metrics import ServingMetrics
from serving.problems import Problem
from serving.settings import ServerSettings

if TYPE_CHECKING:
    from serving.scoring.scorer import Scorer

_LONGEST_WAIT_S = 300.0
_LOCK_SWITCH_S = 0.0005


class BundleSource:
    """Versions of the bundle at one address."""

    def __init__(self, settings: ServerSettings) -> None:
        self._url, self._cache_dir = settings.model, settings.cache_dir

    def newest(self) -> BundleIdentity:
        """Look up the version in use, and its newest vectors; a few small reads."""
        return BundleIdentity.newest(self._url)

    def open(self, identity: BundleIdentity, current: "Scorer | None") -> "Scorer":
        """Load a version with these vectors; newer vectors of the current version keep its network and ID rows.

        Raises BundleNotFoundError, BrokenBundleError, SnapshotNotFoundError, StorageError.
        """
        from serving.scoring.scorer import Scorer  # loads Torch: not in the supervisor of several workers

        if current is not None and current.identity.version == identity.version:
            return current.with_vectors(identity.vectors)
        scorer = Scorer.open(self._url, identity.version, vectors=identity.vectors, cache_dir=self._cache_dir)
        if (note := scorer.network.note) is not None:
            logger.warning("version %d: %s", identity.version, note)
        return scorer


def warm_up(model: "Scorer") -> int:
    """Score the bundle's sample, row by row; return the number of rows, 0 if it has none.

    Raises BrokenBundleError if a score is not a finite number; errors of the model propagate.
    """
    if (sample := model.sample()) is None:
        return 0
    try:
        for row in range(sample.num_rows):
            model.score(sample.slice(row, 1))
    except NotFiniteError as error:
        raise BrokenBundleError(Problem.SCORES_NOT_FINITE, model.identity.version) from error
    return sample.num_rows


@dataclass
class LiveModel:
    """The model in use; `start` loads the first one, `run` switches to newer ones."""

    source: BundleSource
    metrics: ServingMetrics
    poll_s: float
    _model: "Scorer | None" = None
    _refused: BundleIdentity | None = None
    _try_again_s: float = 0.0
    _wait_s: float = 0.0
    _poll_failed: bool = False
    _held: "Scorer | None" = None

    @property
    def model(self) -> "Scorer":
        """The model in use. Raises RefusedError (503) until one is loaded."""
        if self._model is None:
            raise RefusedError(503, Problem.NOT_LOADED, **AGAIN)
        return self._model

    @contextmanager
    def held(self) -> "Iterator[Scorer]":
        """Keep the model in use open until the end of the block, even if another one replaces it.

        One block at a time. Raises RefusedError (503) until a model is loaded.
        """
        self._held = model = self.model
        try:
            yield model
        finally:
            self._held = None
            if model is not self._model:
                model.close()

    @property
    def is_ready(self) -> bool:
        """Whether a model is loaded and warmed up."""
        return self._model is not None

    async def start(self) -> None:
        """Load and warm up the first model. Raises the source's errors, as there is no model to fall back to."""
        identity = await asyncio.to_thread(self.source.newest)
        self._use(await self._loaded(identity))

    async def run(self) -> None:
        """Switch to every newer model, until cancelled."""
        while True:
            await asyncio.sleep(self.poll_s)
            await self.poll_once()

    async def poll_once(self) -> None:
        """Look for a newer model once, and switch to it; refuse, log and count a broken one."""
        try:
            identity = await asyncio.to_thread(self.source.newest)
        except Exception as error:
            if not self._poll_failed:
                logger.warning("cannot look for a newer model, and will try again: %s", error)
            self._poll_failed = True
            return
        if self._poll_failed:
            logger.info("can look for newer models again")
        self._poll_failed = False
        self.metrics.record_age(self.model)
        if identity == self.model.identity:
            self._refused, self._wait_s = None, 0.0
            return
        if identity == self._refused and time.monotonic() < self._try_again_s:
            return
        try:
            self._use(await self._loaded(identity))
        except Exception as error:
            self._refuse(identity, error)
        await asyncio.to_thread(return_freed_memory)

    def close(self) -> None:
        """Close the model; afterwards none is ready."""
        model, self._model = self._model, None
        if model is not None and model is not self._held:
            model.close()

    async def _loaded(self, identity: BundleIdentity) -> "Scorer":
        usual_s = sys.getswitchinterval()
        sys.setswitchinterval(_LOCK_SWITCH_S)  # the loader's thread must not hold up the answers of the loop
        try:
            return await asyncio.to_thread(self._load, identity)
        finally:
            sys.setswitchinterval(usual_s)

    def _load(self, identity: BundleIdentity) -> "Scorer":
        start_s = time.perf_counter()
        model = self.source.open(identity, self._model)
        try:
            count = warm_up(model)
        except BaseException:
            model.close()
            raise
        logger.info("loaded %s, warmed up by %d requests, in %.1f s", identity, count, time.perf_counter() - start_s)
        return model

    def _use(self, model: "Scorer") -> None:
        old, self._model = self._model, model
        self._refused, self._wait_s = None, 0.0
        self.metrics.record_model(model, switched=old is not None)
        if old is not None:
            logger.info("switched from %s to %s", old.identity, model.identity)
            if old is not self._held:
                old.close()

    def _refuse(self, identity: BundleIdentity, error: Exception) -> None:
        self._wait_s = min(_LONGEST_WAIT_S, 2 * self._wait_s) if identity == self._refused else self.poll_s
        self._refused, self._try_again_s = identity, time.monotonic() + self._wait_s
        self.metrics.switches.labels("refused").inc()
        kind = type(error).__name__
        logger.error("refused %s, still serving %s: %s: %s", identity, self.model.identity, kind, error)
