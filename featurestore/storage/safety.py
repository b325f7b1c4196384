"""Is a place fit for a store? A commit needs an exclusive create that one of many writers wins, and reads that see it.

Some object stores ignore the condition of a put, and some look first and write then: there two writers can both be told
that their commit was made, and one of them is lost. Only a race shows the second kind.
"""

import contextlib
import multiprocessing
import random
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import NamedTuple, cast

from featurestore.errors import StorageError, UnsafeBackendError
from featurestore.storage.local import TEMPORARY
from featurestore.storage.storage import Storage
from featurestore.storage.threads import Progress

_SHORT_THREADS, _SHORT_ROUNDS = 2, 5  # SeaweedFS lets a third one wait for a second
_HEAD_START_S = 0.002  # so that all racers have heard of the start when it comes
_ANSWER_TIMEOUT_S = 300.0


class _Outcome(NamedTuple):
    """What one racer saw."""

    claimed: bool
    seen: bytes  # the file, read as soon as the answer was there
    seconds: float  # of the create


Race = Callable[[str, Sequence[bytes], Sequence[float]], list[_Outcome]]  # path, content and start of each racer


@dataclass(frozen=True)
class BackendReport:
    """What the check found; fit for a store where there are no problems."""

    problems: tuple[str, ...]
    num_rounds: int
    num_writers: int
    create_s: float  # median time of a create in the race


def check_backend(
    storage: Storage, *, num_processes: int = 4, num_rounds: int = 50, progress: Progress | None = None
) -> BackendReport:
    """Try what commits rely on at `storage`, then race `num_processes` processes for one file, `num_rounds` times.

    The race is left out where the first part fails. Writes a folder of its own and removes it. Costs
    `2 * num_processes` requests a round. Raises StorageError where the place refuses altogether.
    """
    with _folder(storage) as folder:
        problems = _sequential_problems(storage, folder)
        if problems:
            return BackendReport(tuple(problems), 0, num_processes, 0.0)
        with _racing_processes(storage, num_processes) as race:
            return _race(storage, folder, race, num_processes, num_rounds, progress)


def refuse_unsafe(storage: Storage) -> None:
    """The short form, with threads, for the first write to a new place. Raises UnsafeBackendError, StorageError."""
    with _folder(storage) as folder:
        problems = _sequential_problems(storage, folder)
        if not problems:
            with ThreadPoolExecutor(_SHORT_THREADS) as pool:

                def race(path: str, contents: Sequence[bytes], starts: Sequence[float]) -> list[_Outcome]:
                    futures = [
                        pool.submit(_attempt, storage, path, *each) for each in zip(contents, starts, strict=True)
                    ]
                    return [future.result() for future in futures]

                problems = list(_race(storage, folder, race, _SHORT_THREADS, _SHORT_ROUNDS, None).problems)
    if problems:
        raise UnsafeBackendError(
            f"{storage.url} cannot hold a store, as commits could be lost there: {'; '.join(problems)}. Use a disk or"
            " a server whose conditional put is atomic; `python -m featurestore check-backend URL` tries it at length"
        )


@contextlib.contextmanager
def _folder(storage: Storage) -> Iterator[str]:
    folder = f"{TEMPORARY}check-{uuid.uuid4().hex}"
    try:
        yield folder
    except BaseException:  # an interrupt too
        with contextlib.suppress(StorageError):  # the first refusal is the one to tell
            storage.delete(folder)
        raise
    storage.delete(folder)


def _sequential_problems(storage: Storage, folder: str) -> list[str]:
    """What goes wrong with one writer alone."""
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
    storage: Storage, folder: str, race: Race, num_writers: int, num_rounds: int, progress: Progress | None
) -> BackendReport:
    """Let them race, and count the rounds that went wrong."""
    chance = random.Random()
    seconds: list[float] = []
    several, changed = 0, 0
    for number in range(num_rounds):
        # All at once, and in every second round spread over the time of a create: windows of servers lie differently.
        spread = median(seconds[-100:]) if number % 2 else 0.0
        start = time.monotonic() + _HEAD_START_S
        contents = [f"{uuid.uuid4().hex} of writer {writer}".encode() for writer in range(num_writers)]
        path = f"{folder}/round-{number:06d}"
        outcomes = race(path, contents, [start + chance.uniform(0, spread) for _ in contents])
        seconds += [outcome.seconds for outcome in outcomes]
        final = _read(storage, path)
        several += sum(outcome.claimed for outcome in outcomes) > 1
        # One answer "it exists" to the maker is allowed: a throttled put is asked for again. Its file stays what it is.
        changed += final not in contents or {outcome.seen for outcome in outcomes} != {final}
        if progress is not None:
            progress(number + 1, num_rounds)
    problems = []
    if several:
        problems.append(f"in {several} of {num_rounds} races several of {num_writers} writers were told that they won")
    if changed:
        problems.append(f"in {changed} of {num_rounds} races a file changed or was gone after its creation")
    return BackendReport(tuple(problems), num_rounds, num_writers, median(seconds) if seconds else 0.0)


def _attempt(storage: Storage, path: str, content: bytes, start_s: float) -> _Outcome:
    time.sleep(max(0.0, start_s - time.monotonic()))
    begin = time.monotonic()
    claimed = storage.create_exclusive(path, content)
    seconds = time.monotonic() - begin
    return _Outcome(claimed, _read(storage, path) or b"", seconds)


def _read(storage: Storage, path: str) -> bytes | None:
    try:
        return storage.read_bytes(path)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _racing_processes(storage: Storage, num_processes: int) -> Iterator[Race]:
    """Processes that wait for orders; each has a client of its own, already connected. They end with the block."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(num_processes)]
    processes = [context.Process(target=_racer, args=(storage, theirs), daemon=True) for _, theirs in pipes]

    def race(path: str, contents: Sequence[bytes], starts: Sequence[float]) -> list[_Outcome]:
        with _deaths_noticed():
            for (ours, _), content, start in zip(pipes, contents, starts, strict=True):
                ours.send((path, content, start))
            return [_answer(ours) for ours, _ in pipes]

    try:
        for process, (_, theirs) in zip(processes, pipes, strict=True):
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
        with _deaths_noticed():
            for ours, _ in pipes:
                _answer(ours)
        yield race
    finally:
        for ours, _ in pipes:
            ours.close()
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


def _answer(pipe: "Connection[object, object]") -> _Outcome:
    answer = pipe.recv() if pipe.poll(_ANSWER_TIMEOUT_S) else StorageError("a racing process does not answer")
    if isinstance(answer, StorageError):
        raise answer
    assert isinstance(answer, _Outcome)
    return answer


@contextlib.contextmanager
def _deaths_noticed() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise StorageError("a racing process ended early") from error


def _racer(storage: Storage, pipe: "Connection[object, object]") -> None:
    """One process: an answer once it is connected, then one for each order, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business, which ends this process
    order: tuple[str, bytes, float] | None = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            try:
                if order is None:
                    storage.list()
                    pipe.send(_Outcome(False, b"", 0.0))
                else:
                    pipe.send(_attempt(storage, *order))
            except StorageError as error:
                pipe.send(error)
            order = cast("tuple[str, bytes, float]", pipe.recv())
