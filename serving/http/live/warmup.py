"""Requests that warm up a model before it answers: recorded ones, or else synthetic ones with its columns.

The warm-up is also the last check of a new version: its scores of synthetic requests and of its own sample must be
finite numbers. Recorded requests do not count for the check: those that cannot be scored are left out. Recording keeps
user data in memory, and writes it to a disk only if a file is given (--record-file).
"""

import logging
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from featurestore.text import one_line
from serving.errors import BrokenBundleError, NotFiniteError, RequestError
from serving.http.codec import as_json, parse_json, request_of
from serving.http.live.model import Model
from serving.network.steps import run_steps
from serving.scoring.budget import Budget
from serving.scoring.request import Request, check_sizes, sizes_of
from trainer.samples.columns import Rule

logger = logging.getLogger("serving")

SYNTHETIC_CANDIDATES = (1, 200, 0, 2, 1)
SYNTHETIC_HISTORY = (30, 30, 0, 1, 2)
ROUNDS = 3
MAX_RECORDED_BYTES = 256 << 10


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
