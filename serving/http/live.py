"""The model in use, its warm-up, and the switch to a newer one while requests continue.

A thread polls every few seconds for another version in use and for newer vectors, loads that model while the old one
answers, and warms it up; then the event loop switches to it. A body that is being scored at this moment keeps the old
model open (`held`) until its last piece. A version that cannot be loaded, or fails its warm-up, is refused: the old one
stays in use, and the new one is tried again later.

The warm-up scores recorded requests, or else synthetic ones. It is also the last check of a new version: its scores of
synthetic requests and of its own sample must be finite numbers. Recorded requests do not count for the check: those
that cannot be scored are left out. Recording keeps user data in memory, and writes it to a disk only if a file is given
(--record-file).
"""

import asyncio
import logging
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from featurestore.text import one_line
from serving.bundle.log import BundleIdentity
from serving.errors import BrokenBundleError, NotFiniteError, RequestError
from serving.http.codec import Identity, Model, ModelSource, as_json, parse_json, request_of
from serving.http.metrics import ServingMetrics
from serving.network import run_steps
from serving.scoring.request import Request, check_sizes, sizes_of
from serving.settings import Budget, ServerSettings
from trainer.samples.columns import Rule

if TYPE_CHECKING:
    from serving.scoring.scorer import Scorer

logger = logging.getLogger("serving")

SYNTHETIC_CANDIDATES = (1, 200, 0, 2, 1)

SYNTHETIC_HISTORY = (30, 30, 0, 1, 2)

ROUNDS = 3

MAX_RECORDED_BYTES = 256 << 10

_LONGEST_WAIT_S = 300.0

_LOCK_SWITCH_S = 0.0005


class BundleSource:
    """Versions of the bundle at one address."""

    def __init__(self, settings: ServerSettings) -> None:
        self._url, self._cache_dir = settings.model, settings.cache_dir

    def newest(self) -> BundleIdentity:
        """Look up the version in use, and its newest vectors; a few small reads."""
        return BundleIdentity.newest(self._url)

    def open(self, identity: Identity, current: Model | None) -> "Scorer":
        """Load a version with these vectors; newer vectors of the current version keep its network and ID rows.

        Raises BundleNotFoundError, BrokenBundleError, SnapshotNotFoundError, StorageError.
        """
        from serving.scoring.scorer import Scorer  # loads Torch: not in the supervisor of several workers

        if isinstance(current, Scorer) and current.identity.version == identity.version:
            return Scorer(current.bundle.with_vectors(identity.vectors))
        scorer = Scorer.open(self._url, identity.version, vectors=identity.vectors, cache_dir=self._cache_dir)
        if (note := scorer.bundle.network.note) is not None:
            logger.warning("version %d: %s", identity.version, note)
        return scorer


class Recorder:
    """Keeps a uniform random sample of up to `capacity` requests (reservoir sampling)."""

    def __init__(self, capacity: int, file: Path | None = None) -> None:
        self._capacity, self._file = capacity, file
        self._requests: list[Request] = []
        self._seen = 0
        self._random = random.Random(0)
        if file is not None and file.exists():
            self._requests = _read(file)[:capacity]

    def add(self, requests: Sequence[Request], size_bytes: int) -> None:
        """Keep some of the requests of one body; large bodies are left out."""
        if not self._capacity or size_bytes > MAX_RECORDED_BYTES:
            return
        for request in requests:
            self._seen += 1
            if len(self._requests) < self._capacity:
                self._requests.append(request)
            elif (place := self._random.randrange(self._seen)) < self._capacity:
                self._requests[place] = request

    def recorded(self) -> list[Request]:
        """List the recorded requests."""
        return list(self._requests)

    def save(self) -> None:
        """Write the recorded requests to the file, if any: one JSON object per line, readable only by its owner."""
        if self._file is None or not self._requests:
            return
        lines = [orjson.dumps(as_json(each)) + b"\n" for each in self._requests]
        temporary = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        try:
            temporary.touch(0o600)
            temporary.write_bytes(b"".join(lines))
            temporary.replace(self._file)
        except OSError as failure:
            logger.warning("cannot write recorded requests to %s: %s", self._file, failure.strerror)


def warm_up(model: Model, recorder: Recorder) -> int:
    """Check a model, then score the recorded requests that fit it, or else synthetic ones; return their number.

    A version is checked with synthetic requests and the bundle's own sample. Recorded requests say nothing against it:
    those that cannot be scored are dropped. Raises BrokenBundleError if a score is not finite; errors of the model
    propagate.
    """
    drawn = list(synthetic_requests(model.columns))
    _judge(model, drawn)
    fitting = [request for request in recorder.recorded() if _fits(model, request)]
    requests = fitting or drawn
    for _ in range(ROUNDS):
        for request in requests:
            model.score([request])
        if not fitting:
            model.score(requests)
    return len(requests)


def _judge(model: Model, drawn: Sequence[Request]) -> None:
    """Raise BrokenBundleError if a synthetic request, or a row of the sample, gets a logit that is not finite."""
    sample = model.sample()
    rows = [] if sample is None else [sample.slice(row, 1) for row in range(sample.num_rows)]
    try:
        scored = [*model.score(drawn), *(each for row in rows for each in model.score_table(row))]
    except NotFiniteError as error:
        raise _unsound(model) from error
    if not all(np.isfinite(each.logits_C).all() for each in scored):
        raise _unsound(model)


def synthetic_requests(columns: Mapping[str, Rule]) -> Iterable[Request]:
    """Generate requests with the model's columns: one candidate and many, a long history and none."""
    for num_candidates, num_behaviors in zip(SYNTHETIC_CANDIDATES, SYNTHETIC_HISTORY, strict=True):
        user = {name: _value(rule, num_behaviors) for name, rule in columns.items() if rule.side == "user"}
        ads = {name: _value(rule, num_candidates) for name, rule in columns.items() if rule.side == "ad"}
        yield Request(user=user, candidates=ads)


def _value(rule: Rule, count: int) -> Any:
    """Generate a value of a column: `count` entries at the outermost level, inside them the rule's width or one."""
    number: Any = 1 if rule.number == "integer" else 0.5
    if rule.depth == 0:
        return number
    if rule.side == "user" and rule.depth == 1 and rule.width is not None:
        return [number] * rule.width
    inner = number if rule.depth == 1 else [number] * (rule.width or 1)
    return [inner] * count


def _fits(model: Model, request: Request) -> bool:
    try:
        scored = model.score([request])
    except RequestError:  # it has columns that this version lacks, or numbers too large for it
        return False
    except Exception as error:
        logger.warning("a recorded request is left out: it cannot be scored (%s)", type(error).__name__)
        return False
    return all(np.isfinite(each.logits_C).all() for each in scored)


def _unsound(model: Model) -> BrokenBundleError:
    return BrokenBundleError(
        f"version {model.identity.version} gives scores that are not finite numbers: export a sound run, or go "
        "back by `python -m serving use`"
    )


def _read(file: Path) -> list[Request]:
    """Read recorded requests; skip lines that are invalid, or too large for a server's default limits."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError as failure:
        logger.warning("cannot warm up with %s, using synthetic requests: %s", file, one_line(str(failure)))
        return []
    found, budget = [], Budget()
    for number, line in enumerate(lines, 1):
        try:
            request = request_of(run_steps(parse_json(line, budget)), f"{file}, line {number}", budget)
            check_sizes(budget, sizes_of([request], {}))
            found.append(request)
        except RequestError as failure:
            logger.warning("a recorded request is left out: %s", one_line(str(failure)))
    return found


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
