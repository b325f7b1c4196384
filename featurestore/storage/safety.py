"""Check of a place for a store: of many writers one must win the exclusive create, and reads must see what was written.

Some object stores ignore the condition of a put, and some look first and write then: there two writers can both hear
that their commit was made, and one of them is lost. Only a race shows the second kind, and only where the requests of
two writers are at the server at once: a race counts where a create lost that began before the winner had its answer.
No race proves that a place is safe: the check says what it could not disprove, and from how many races that counted.
"""

import contextlib
import hashlib
import multiprocessing
import random
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from featurestore.errors import StorageError, UnsafeBackendError
from featurestore.storage.local import TEMPORARY
from featurestore.storage.storage import Storage
from featurestore.storage.threads import Progress, interrupt_blocked

_SHORT_THREADS, _SHORT_ROUNDS = 2, 5  # SeaweedFS lets a third one wait for a second
_START_TIMEOUT_S = 300.0
_LARGE_BYTES = 1 << 20  # as a manifest of 2,000 data files
_mine = threading.local()


class _Outcome(NamedTuple):
    """Outcome of a race for one racer."""

    claimed: bool
    seen: bytes  # digest of the file, read as soon as the answer was there
    begin_s: float  # of the create, by the clock that all processes of this machine share
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
    storage: Storage, *, num_processes: int = 4, num_rounds: int = 50, progress: Progress | None = None
) -> BackendReport:
    """Try what commits rely on at `storage`, then race `num_processes` processes for one file, `num_rounds` times.

    The race is left out where the first part fails. All processes have a connection when it begins; every second round
    is for a file of a megabyte. Writes a folder of its own and removes it. Costs `2 * num_processes` requests a round,
    and holds `num_rounds / 2` megabytes there. Raises StorageError where the place refuses altogether.
    """
    context = multiprocessing.get_context("spawn")
    with _folder(storage) as folder:
        problems = _sequential_problems(storage, folder)
        if problems:
            return BackendReport(tuple(problems), 0, 0, num_processes, 0.0)
        line: Any = context.Barrier(num_processes)
        try:
            with ProcessPoolExecutor(num_processes, context, _prepare, (line,)) as racers:
                with interrupt_blocked():  # the processes start
                    connected = [racers.submit(_connect, storage) for _ in range(num_processes)]
                for each in connected:
                    each.result()
                return _race(storage, folder, racers, num_processes, num_rounds, progress, _LARGE_BYTES)
        except BrokenProcessPool as error:
            raise StorageError("a racing process ended early") from error


def refuse_unsafe(storage: Storage) -> None:
    """Check in short, with threads, for the first write to a new place. Raises UnsafeBackendError, StorageError."""
    with _folder(storage) as folder:
        problems = _sequential_problems(storage, folder)
        if not problems:
            line = threading.Barrier(_SHORT_THREADS)
            with ThreadPoolExecutor(_SHORT_THREADS, initializer=_prepare, initargs=(line,)) as racers:
                problems = list(_race(storage, folder, racers, _SHORT_THREADS, _SHORT_ROUNDS, None, 0).problems)
    if problems:
        raise UnsafeBackendError(
            f"{storage.url} cannot hold a store, as commits could be lost there: {'; '.join(problems)}. Use a disk or"
            " a server whose conditional put is atomic; `crossmedia store check-backend URL` tries it at length"
        )


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

    expect(storage.create_exclusive(path, b"one"), "the exclusive create of a new file says that it exists")
    expect(_read(storage, path) == b"one", "a file cannot be read right after it was created")
    expect(storage.list(folder) == ["first"], "a listing does not show a file that was just created")
    taken = not storage.create_exclusive(path, b"two")
    kept = _read(storage, path) == b"one"
    expect(kept, "the exclusive create of a file that exists overwrites it: the condition (If-None-Match) is ignored")
    expect(taken or not kept, "the exclusive create of a file that exists says that it made it")
    storage.write_bytes(path, b"three")
    expect(_read(storage, path) == b"three", "a file that was replaced still reads as before")
    storage.delete(path)
    expect(_read(storage, path) is None and storage.list(folder) == [], "a deleted file is still read or listed")
    expect(storage.create_exclusive(path, b"four"), "a deleted name cannot be created again")
    return problems


def _race(
    storage: Storage,
    folder: str,
    racers: Executor,
    num_writers: int,
    num_rounds: int,
    progress: Progress | None,
    large_bytes: int,
) -> BackendReport:
    """Let the racers race, and count the rounds that overlapped, and those that went wrong."""
    chance = random.Random()
    seconds: list[float] = []
    several, changed, overlapping = 0, 0, 0
    for number in range(num_rounds):
        # All at once, and in every third round spread over the time of a create: windows of servers lie differently.
        spread = median(seconds[-100:]) if number % 3 == 2 else 0.0
        padding = bytes(large_bytes if number % 2 else 0)
        contents = [f"{uuid.uuid4().hex} of writer {writer}".encode() + padding for writer in range(num_writers)]
        path = f"{folder}/round-{number:06d}"
        asked = [racers.submit(_attempt, storage, path, content, chance.uniform(0, spread)) for content in contents]
        outcomes = [each.result() for each in asked]
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
        problems.append(
            f"in {several} of {num_rounds} races several of {num_writers} writers got the answer that they won"
        )
    if changed:
        problems.append(f"in {changed} of {num_rounds} races a file changed or was gone after its creation")
    create_s = median(seconds) if seconds else 0.0
    return BackendReport(tuple(problems), num_rounds, overlapping, num_writers, create_s)


def _overlap(outcomes: Sequence[_Outcome]) -> bool:
    """Return whether a create lost although it began before the winner had its answer."""
    ends_s = [each.end_s for each in outcomes if each.claimed]
    return any(each.begin_s < end_s for end_s in ends_s for each in outcomes if not each.claimed)


def _prepare(line: threading.Barrier) -> None:
    """Make this thread or process a racer, which begins when all have come to the line."""
    _mine.line = line


def _connect(storage: Storage) -> None:
    _mine.line.wait(_START_TIMEOUT_S)
    storage.list()


def _attempt(storage: Storage, path: str, content: bytes, delay_s: float) -> _Outcome:
    _mine.line.wait(_START_TIMEOUT_S)
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
