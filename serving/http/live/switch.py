"""The model in use, and the switch to a newer one while requests continue.

A thread polls every few seconds for another version in use and for newer vectors, loads that model while the old one
answers, and warms it up; then the event loop switches to it. A body that is being scored at this moment keeps the old
model open (`held`) until its last piece. A version that cannot be loaded, or fails its warm-up, is refused: the old one
stays in use, and the new one is tried again later.
"""

import asyncio
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from serving.http.live.model import Identity, Model, ModelSource
from serving.http.live.warmup import Recorder, warm_up
from serving.http.metrics import ServingMetrics

logger = logging.getLogger("serving")

_LONGEST_WAIT_S = 300.0
_LOCK_SWITCH_S = 0.0005


class NotReadyError(Exception):
    """No model is loaded and warmed up yet."""


@dataclass
class LiveModel:
    """The model in use; `start` loads the first one, `run` switches to newer ones."""

    source: ModelSource
    recorder: Recorder
    metrics: ServingMetrics
    poll_s: float
    _model: Model | None = None
    _refused: Identity | None = None
    _try_again_s: float = 0.0
    _wait_s: float = 0.0
    _poll_failed: bool = False
    _held: Model | None = None

    @property
    def model(self) -> Model:
        """The model in use. Raises NotReadyError."""
        if self._model is None:
            raise NotReadyError
        return self._model

    @contextmanager
    def held(self) -> Iterator[Model]:
        """Keep the model in use open until the end of the block, even if another one replaces it.

        One block at a time. Raises NotReadyError.
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

    def close(self) -> None:
        """Close the model; afterwards none is ready."""
        model, self._model = self._model, None
        if model is not None and model is not self._held:
            model.close()

    async def _loaded(self, identity: Identity) -> Model:
        usual_s = sys.getswitchinterval()
        sys.setswitchinterval(_LOCK_SWITCH_S)  # the loader's thread must not hold up the answers of the loop
        try:
            return await asyncio.to_thread(self._load, identity)
        finally:
            sys.setswitchinterval(usual_s)

    def _load(self, identity: Identity) -> Model:
        start_s = time.perf_counter()
        model = self.source.open(identity, self._model)
        try:
            count = warm_up(model, self.recorder)
        except BaseException:
            model.close()
            raise
        logger.info(
            "loaded %s, warmed up by %d requests, in %.1f s", describe(identity), count, time.perf_counter() - start_s
        )
        return model

    def _use(self, model: Model) -> None:
        old, self._model = self._model, model
        self._refused, self._wait_s = None, 0.0
        self.metrics.record_model(model, switched=old is not None)
        if old is not None:
            logger.info("switched from %s to %s", describe(old.identity), describe(model.identity))
            if old is not self._held:
                old.close()

    def _refuse(self, identity: Identity, error: Exception) -> None:
        self._wait_s = (
            min(_LONGEST_WAIT_S, 2 * self._wait_s or self.poll_s) if identity == self._refused else self.poll_s
        )
        self._refused, self._try_again_s = identity, time.monotonic() + self._wait_s
        self.metrics.switches.labels("refused").inc()
        logger.error(
            "refused %s, still serving %s: %s: %s",
            describe(identity),
            describe(self.model.identity),
            type(error).__name__,
            error,
        )


def describe(identity: Identity) -> str:
    """Describe a model for the log, e.g. `version 3 (vectors: images 17)`."""
    stores = ", ".join(f"{store} {snapshot}" for store, snapshot in identity.vectors.items())
    return f"version {identity.version}" + (f" (vectors: {stores})" if stores else "")
