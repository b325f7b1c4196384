"""Check of a place for a store: of many writers one must win the exclusive create, and reads must see the last write.

Some object stores ignore the condition of a put, and some look first and write then: there two writers can both hear
that their commit was made, and one of them is lost. Only a race shows the second kind, and only where the requests of
two writers are at the server at once: a race counts where a create lost that began before the winner had its answer.
No race proves that a place is safe: the check says what it could not disprove, and from how many races that counted.
"""

import contextlib
import hashlib
import random
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from featurestore.errors import StorageError, UnsafeBackendError
from featurestore.problems import Problem
from featurestore.storage.local import TEMPORARY
from featurestore.storage.storage import Progress, Storage

_SHORT_WRITERS, _SHORT_ROUNDS = 2, 5  # SeaweedFS lets a third one wait for a second
_START_TIMEOUT_S = 300.0
_LARGE_BYTES = 1 << 20  # as a manifest of 2,000 data files


class _Outcome(NamedTuple):
    """Outcome of a race for one writer."""

    claimed: bool
    seen: bytes  # digest of the file, read as soon as the answer was there
    begin_s: float  # of the create
    end_s: float


@dataclass(frozen=True)
class BackendReport:
    """Findings of the check; nothing speaks against the place where there are no problems and races that overlapped."""

    problems: tuple[str, ...]
    num_rounds: int
    num_overlapping: int  # of them: a create lost to one that had no answer yet when it began
    num_writers: int
    create_s: float  # median time of a create in the race


def check_backend(
    storage: Storage,
    *,
    num_writers: int = 4,
    num_rounds: int = 50,
    large_bytes: int = _LARGE_BYTES,
    progress: Progress | None = None,
) -> BackendReport:
    """Test the operations of commits at `storage`, then race `num_writers` threads for one file, `num_rounds` times.

    The race is left out where the first part fails. Every second round is for a file of `large_bytes`. Writes a folder
    of its own and removes it. Costs `2 * num_writers` requests a round, and holds `num_rounds / 2` of the large files
    there. Raises StorageError where the place refuses altogether.
    """
    with _folder(storage) as folder:
        problems = _sequential_problems(storage, folder)
        if problems:
            return BackendReport(tuple(problems), 0, 0, num_writers, 0.0)
        with ThreadPoolExecutor(num_writers) as writers:
            return _race(storage, folder, writers, num_writers, num_rounds, progress, large_bytes)


def refuse_unsafe(storage: Storage) -> None:
    """Check in short, for the first write to a new place. Raises UnsafeBackendError, StorageError."""
    problems = check_backend(storage, num_writers=_SHORT_WRITERS, num_rounds=_SHORT_ROUNDS, large_bytes=0).problems
    if problems:
        raise UnsafeBackendError(Problem.UNSAFE_BACKEND, storage.url, "; ".join(problems))


@contextlib.contextmanager
def _folder(storage: Storage) -> Iterator[str]:
    folder = f"{TEMPORARY}check-{uuid.uuid4().hex}"
    try:
        yield folder
    except BaseException:  # an interrupt too
        with contextlib.suppress(StorageError):  # the first refusal is the one to report
            storage.delete(folder)
        raise
    storage.delete(folder)


def _sequential_problems(storage: Storage, folder: str) -> list[str]:
    """List the problems that occur with a single writer."""
    path = f"{folder}/first"
    problems: list[str] = []

    def expect(holds: bool, otherwise: str) -> None:
        if not holds:
            problems.append(otherwise)

    expect(storage.create_exclusive(path, b"one"), Problem.NEW_FILE_EXISTS.of())
    expect(_read(storage, path) == b"one", Problem.NEW_FILE_UNREAD.of())
    expect(storage.list(folder) == ["first"], Problem.NEW_FILE_UNLISTED.of())
    taken = not storage.create_exclusive(path, b"two")
    kept = _read(storage, path) == b"one"
    expect(kept, Problem.CONDITION_IGNORED.of())
    expect(taken or not kept, Problem.CREATE_ANSWERS_WRONG.of())
    storage.write_bytes(path, b"three")
    expect(_read(storage, path) == b"three", Problem.OLD_CONTENT_READ.of())
    storage.delete(path)
    expect(_read(storage, path) is None and storage.list(folder) == [], Problem.DELETED_FILE_SEEN.of())
    expect(storage.create_exclusive(path, b"four"), Problem.DELETED_NAME_KEPT.of())
    return problems


def _race(
    storage: Storage,
    folder: str,
    writers: ThreadPoolExecutor,
    num_writers: int,
    num_rounds: int,
    progress: Progress | None,
    large_bytes: int,
) -> BackendReport:
    """Let the writers race, and count the rounds that overlapped, and those that went wrong."""
    chance, line = random.Random(), threading.Barrier(num_writers)
    seconds: list[float] = []
    several, changed, overlapping = 0, 0, 0
    for number in range(num_rounds):
        # All at once, and in every third round spread over the time of a create: windows of servers lie differently.
        spread = median(seconds[-100:]) if number % 3 == 2 else 0.0
        padding = bytes(large_bytes if number % 2 else 0)
        contents = [f"{uuid.uuid4().hex} of writer {writer}".encode() + padding for writer in range(num_writers)]
        path = f"{folder}/round-{number:06d}"
        try:
            asked = [
                writers.submit(_attempt, storage, path, content, line, chance.uniform(0, spread))
                for content in contents
            ]
            outcomes = [each.result() for each in asked]
        except BaseException:  # an interrupt too: nobody else will come to the line
            line.abort()
            raise
        seconds += [outcome.end_s - outcome.begin_s for outcome in outcomes]
        final = _digest(_read(storage, path))
        several += sum(outcome.claimed for outcome in outcomes) > 1
        overlapping += _overlap(outcomes)
        # One answer "it exists" to the maker is allowed: a throttled put is asked for again. Its file stays what it is.
        changed += final not in map(_digest, contents) or {outcome.seen for outcome in outcomes} != {final}
        if progress is not None:
            progress(number + 1, num_rounds)
    problems = []
    if several:
        problems.append(Problem.SEVERAL_WON.of(several, num_rounds, num_writers))
    if changed:
        problems.append(Problem.CHANGED_AFTER_CREATION.of(changed, num_rounds))
    create_s = median(seconds) if seconds else 0.0
    return BackendReport(tuple(problems), num_rounds, overlapping, num_writers, create_s)


def _overlap(outcomes: Sequence[_Outcome]) -> bool:
    """Return whether a create lost although it began before the winner had its answer."""
    ends_s = [each.end_s for each in outcomes if each.claimed]
    return any(each.begin_s < end_s for end_s in ends_s for each in outcomes if not each.claimed)


def _attempt(storage: Storage, path: str, content: bytes, line: threading.Barrier, delay_s: float) -> _Outcome:
    line.wait(_START_TIMEOUT_S)
    time.sleep(delay_s)
    begin = time.monotonic()
    claimed = storage.create_exclusive(path, content)
    end = time.monotonic()
    return _Outcome(claimed, _digest(_read(storage, path)), begin, end)


def _digest(content: bytes | None) -> bytes:
    return hashlib.sha256(content or b"").digest()


def _read(storage: Storage, path: str) -> bytes | None:
    try:
        return storage.read_bytes(path)
    except FileNotFoundError:
        return None
