"""A run's checkpoints as they are written: the parts, the place on a disk or an object store, and who writes them.

    RUN/
      config.yaml report.json ids.parquet tensorboard/…    plain files, each replaced as a whole
      checkpoints/
        versions/00000000000000000012.json                 step-00000050/state.json, … and where they lie
        files/step-00000050-state-<random>.json files/step-00000050-dense-<random>.safetensors
        files/step-00000050-rows-00000-of-00002-<random>.safetensors

Each part is written to a path of its own, where nobody looks for it; creating the version that names it, after the one
that this run made last, is the commit (`featurestore.published`). So a run that is killed at any moment leaves the
checkpoints that it had, or the new one too. All ranks write to one place: with several machines it is a shared disk or
an object store.

A run begins by a version of its own. So of two that write to one place, the later one continues, and the other is
refused at its next checkpoint. Files that the newest version does not name are removed at once on a disk, which has to
have room for one checkpoint more than are kept; an object store keeps them for `KEEP_REMOVED_S`, for readers that hold
an earlier version.

A writer begins a checkpoint, then waits for its end or lets it be written in the background, by a thread that takes
part in no collective. Every rank writes its own part, and says how far it is when all ranks look, between two steps
that all of them know; when all parts are there, a thread of rank 0 publishes the checkpoint. A part that cannot be
written in the background (a full disk, an object store that is away) fails this checkpoint alone: it is reported, and
the training continues.
"""

import contextlib
import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import IO, NamedTuple

import torch
import xxhash
from torch import Tensor

from featurestore.errors import CommitConflictError, StorageError
from featurestore.published import versions
from featurestore.published.paths import RunPath
from featurestore.spec import seal
from featurestore.storage.storage import Storage
from trainer.comm import Comm
from trainer.engine.engine import Engine
from trainer.engine.machine import free_bytes
from trainer.errors import CheckpointError, TakenOverError
from trainer.problems import Problem
from trainer.runs.checkpoint import DENSE, ROWS, CheckpointState, load, read_state, saying
from trainer.runs.folder import STATE, Checkpoint, checkpoints_of, conflicting_checkpoints, step_name, step_of

_FAILURES = (OSError, StorageError, MemoryError)
_WAIT_S = 0.01
_PATIENCE_S = 5.0
_THERE = "it is there"
_LOOK_EVERY_S = 0.25


_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8


def write_tensors(file: IO[bytes], tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    """Write a safetensors file of the tensors, on whichever device; returns the xxh3-128 and the number of its bytes.

    No more than one tensor is copied at a time, where library calls want all of them in one piece. Raises OSError.
    """
    digest, size_bytes = xxhash.xxh3_128(), 0
    for block in _blocks(tensors):
        file.write(block)
        digest.update(block)
        size_bytes += len(block)
    return digest.hexdigest(), size_bytes


def _blocks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the header's length and the header in JSON, then the numbers of each tensor."""
    header: dict[str, dict[str, object]] = {}
    offset = 0
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in ordered:
        end = offset + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        values_N = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))
        yield values_N.view(torch.uint8).numpy().data


def copied(tensors: Mapping[str, Tensor], earlier: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to this machine's memory; afterwards they may change. Each takes the memory of that of its name.

    `earlier`: copies that are needed no more, which is emptied; what has another shape or type takes new memory. Raises
    RuntimeError where there is none."""
    copies = {}
    for name, tensor in tensors.items():
        copy = earlier.pop(name, None)
        if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
            del copy  # before the new one is made
            copy = torch.empty(tensor.shape, dtype=tensor.dtype)
        copies[name] = copy.copy_(tensor.detach())
    earlier.clear()
    return copies


DAMAGED = "damaged-"
"""Before the name of a checkpoint: a run has found it damaged and keeps it; no reader takes it for a checkpoint."""
KEEP_REMOVED_S = 600.0
"""Seconds that checkpoints on an object store can still be read after their removal."""
EXPIRE_EVERY_S = 60.0
"""It reads all versions of the last minutes."""


@dataclass(frozen=True)
class WrittenPart:
    """One file of a checkpoint that is not published yet: the xxh3-128 of its bytes, and where it lies."""

    digest: str
    file: versions.PublishedFile


_NONE = versions.PublishedVersion(version=0, publication="", writer="", time_s=0.0, files={})


class CheckpointPlace:
    """Place of the published checkpoints of the run in folder `run`; `storage` has their files, if it is given.

    Every rank writes its own parts; all else is for rank 0.
    """

    def __init__(self, run: RunPath, storage: Storage | None = None) -> None:
        self.run = run
        self._storage = storage or Storage(str(checkpoints_of(run)))
        self._known: versions.PublishedVersion | None = None
        self._written: list[str] = []
        self._next_expiry_s = 0.0
        self._tried: set[str] = set()
        """Publications of this run; of some it may not know whether they were made, as an answer may be lost."""

    @property
    def is_local(self) -> bool:
        """Whether the files are on a disk."""
        return self._storage.is_local

    def has(self, step: int) -> bool:
        """Return whether the checkpoint of that step is there, whole."""
        return f"{step_name(step)}/{STATE}" in self._newest_known().files

    def address(self, step: int) -> str:
        """Return the address of the checkpoint of a step, there or not."""
        return f"{checkpoints_of(self.run)}/{step_name(step)}"

    def at(self, step: int) -> Checkpoint:
        """Return the checkpoint of a step, which is there."""
        return Checkpoint(self.run, step_name(step), versions.PublishedFiles(self._storage.url, self._newest_known()))

    def write(self, step: int, name: str, content: Mapping[str, Tensor]) -> WrittenPart:
        """Write one part, where nobody sees it yet; an object store gets it in one piece. Raises StorageError."""
        path = versions.part_path(f"{step_name(step)}-{name}")
        if self.is_local:
            self._written.append(path)
        with self._storage.open_output(path) as output:
            digest, size_bytes = write_tensors(output, content)
        return WrittenPart(digest, versions.PublishedFile(path=path, size_bytes=size_bytes))

    def end(self, *, failed: bool) -> None:
        """End a checkpoint on this rank: where it `failed` before all parts were written, a disk gets their room back.

        Those of a rank that was killed are removed when a run begins."""
        if failed:
            with contextlib.suppress(StorageError):
                self._storage.delete_files(self._written)
        self._written.clear()

    def commit(self, step: int, parts: Mapping[str, WrittenPart], state: bytes, keep: int, best: int | None) -> None:
        """Publish a checkpoint of these parts, and remove all but the newest `keep` and that of step `best`.

        One that somebody has removed a file of is not named any more. Raises StorageError, and TakenOverError where
        another start of the run has taken over."""
        stem = step_name(step)
        added = {STATE: versions.write_part(self._storage, f"{stem}-{STATE}", state)}
        added |= {name: part.file for name, part in parts.items()}
        files = self._whole() | {f"{stem}/{name}": file for name, file in added.items()}
        damaged = {each for each in map(_stem, files) if each.startswith(DAMAGED)}
        steps = sorted({*map(_stem, files)} - damaged, key=step_of)
        kept = {*steps[-keep:], *damaged, *([] if best is None else [step_name(best)])}
        self._publish({name: file for name, file in files.items() if _stem(name) in kept})
        self._expire()

    def remove(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Remove checkpoints, all of them at once. Raises StorageError, TakenOverError."""
        if not checkpoints:
            return
        gone = {each.name for each in checkpoints}
        self._publish({name: file for name, file in self._whole().items() if _stem(name) not in gone})
        self._expire()

    def claim(self, damaged: Sequence[Checkpoint] = ()) -> None:
        """Become the writer here, and put these damaged checkpoints aside.

        They are kept under names that nothing takes for a checkpoint (`DAMAGED` before theirs), in the place of those
        kept so before. Raises StorageError, TakenOverError.
        """
        self._known = None
        files = self._newest_known().files
        gone = set(versions.missing(self._storage, files.values()))  # nothing could be published with them
        aside = {each.name for each in damaged} | {_stem(name) for name, file in files.items() if file.path in gone}
        self._publish(
            {
                f"{DAMAGED}{name}" if _stem(name) in aside else name: file
                for name, file in files.items()
                if file.path not in gone and not (aside and name.startswith(DAMAGED))
            }
        )
        self._expire()

    def _whole(self) -> dict[str, versions.PublishedFile]:
        """The files of those that have all of theirs."""
        files = self._newest_known().files
        gone = set(versions.missing(self._storage, files.values()))
        lacking = {_stem(name) for name, file in files.items() if file.path in gone}
        return {name: file for name, file in files.items() if _stem(name) not in lacking}

    def _expire(self) -> None:
        """Remove files that no version names; only after a version of this run, as they may be parts of others."""
        if self.is_local:
            versions.expire(self._storage, KEEP_REMOVED_S, files_at_once=True)
        elif time.monotonic() >= self._next_expiry_s:
            versions.expire(self._storage, KEEP_REMOVED_S)
            self._next_expiry_s = time.monotonic() + EXPIRE_EVERY_S

    def _newest(self) -> versions.PublishedVersion:
        """The newest version that is there now."""
        newest = versions.open_published(self._storage.url)
        return newest.published if isinstance(newest, versions.PublishedFiles) else _NONE

    def _newest_known(self) -> versions.PublishedVersion:
        """The version for the next one to come after: that which was the newest at the first look, or was made here."""
        if self._known is None:
            self._known = self._newest()
        return self._known

    def _publish(self, files: Mapping[str, versions.PublishedFile]) -> None:
        """Publish the next version after the known one. Raises StorageError, TakenOverError."""
        publication = uuid.uuid4().hex
        self._tried.add(publication)
        known = self._newest_known()
        try:
            self._known = versions.publish(self._storage, files, after=known.version, publication=publication)
        except CommitConflictError as failure:
            found = self._newest()
            if found.version == known.version:  # a file is gone
                raise StorageError(*failure.args) from failure
            if found.publication not in self._tried:
                writer = f", {found.writer}" if found.writer else ""
                raise TakenOverError(Problem.TAKEN_OVER, checkpoints_of(self.run), writer) from failure
            self._known = found
            if dict(found.files) != dict(files):  # an earlier one of mine, whose answer was lost
                self._publish(files)
                return
        if gone := versions.missing(self._storage, files.values()):  # since `publish` looked, as this run was away
            raise StorageError(Problem.REMOVED_BEFORE_PUBLISHED, self._storage.full(gone[0]))


def _stem(name: str) -> str:
    """The checkpoint that a file is of."""
    return name.partition("/")[0]


@dataclass
class _Progress:
    """A rank's answer when all poll. `clock_s`, `step_s` count on rank 0 alone."""

    is_busy: bool = False
    """Whether it still writes its parts or, rank 0 alone, publishes the checkpoint."""
    parts: dict[str, WrittenPart] = field(default_factory=dict)
    error: str = ""
    fatal: CheckpointError | None = None
    """Error to raise on all ranks where the run may not continue."""
    clock_s: float = 0.0
    """Seconds since the last checkpoint was begun."""
    step_s: float = 0.0


class Outcome(NamedTuple):
    """The end of a checkpoint: published where `error` is empty."""

    step: int
    error: str


class Checkpointer:
    """Writes one checkpoint at a time. Every rank calls the same methods at the same steps.

    `every_s`: a checkpoint is due so long after the last one was begun; None: by the clock none is. `before_publishing`
    is called in the thread of rank 0.
    """

    def __init__(
        self, comm: Comm, place: CheckpointPlace, every_s: float | None, before_publishing: Callable[[], None]
    ) -> None:
        self._comm, self._place, self._every_s = comm, place, every_s
        self._before_publishing = before_publishing
        self._copies: dict[str, dict[str, Tensor]] = {}  # by part, of the checkpoint before
        self._mine = _Progress()
        self._step: int | None = None  # of the checkpoint that is written
        self._is_publishing = False  # all of its parts are written
        self._publish: Callable[[Mapping[str, WrittenPart]], None] = lambda parts: None
        self._begun_s = self._looked_s = time.monotonic()
        self._looked_step: int | None = None
        self._next_look = 0
        self._thread: threading.Thread | None = None

    @property
    def is_writing(self) -> bool:
        """Return whether a checkpoint is under way; the same on every rank."""
        return self._step is not None

    def should_poll(self, step: int) -> bool:
        """Return whether all ranks poll after that step; the same on every rank."""
        if self._looked_step is None:
            self._looked_step, self._next_look = step, step
        wanted = self.is_writing or self._every_s is not None
        return wanted and step >= self._next_look

    def save(self, trained: Engine, state: CheckpointState, keep: int, best: int | None) -> str:
        """Write a checkpoint without copies, unless it is there already, wait for its end, and return its address.

        Nothing may be under way. Raises CheckpointError on all ranks where one cannot write.
        """
        outcome = self.begin(trained, state, keep, best, beside=False) or self.wait()
        if outcome is not None and outcome.error:
            raise CheckpointError(Problem.REFUSED, "write", self._place.address(state.step), outcome.error)
        return self._place.address(state.step)

    def begin(
        self, trained: Engine, state: CheckpointState, keep: int, best: int | None, *, beside: bool = True
    ) -> Outcome | None:
        """Begin to write a checkpoint, unless it is there already. Nothing may be under way.

        `beside`: the state is copied, and written during the next steps. Else, and where memory has no room for copies,
        this rank's parts are written before this returns. Returns an outcome where it failed at once.
        """
        self._begun_s, step = time.monotonic(), state.step
        content, error = self._prepared(step, trained)
        parts = content, self._copies
        needed, held = (sum(values.nbytes for part in each.values() for values in part.values()) for each in parts)
        needed *= 1 if self._place.is_local else 2  # the file's bytes are held, too
        said = _Ready(error, socket.gethostname(), max(0, needed - held), free_bytes())
        everyone = self._comm.allgather_object(said, name="checkpoint.begin")
        if failed := next((each for each in everyone if each.error), None):
            return None if failed.error == _THERE else Outcome(step, failed.error)
        self._step, self._mine = step, _Progress(is_busy=True)
        self._publish = lambda parts: self._published(state, parts, keep, best)
        self._next_look = step + 1
        if beside and _fits(everyone):
            self._thread = _in_thread(self._with_copies(step, content))
        else:
            self._write(step, content)
        return None

    def look(self, step: int) -> tuple[Outcome | None, bool]:
        """See how far all ranks are.

        Returns how a checkpoint ended, if one did, and whether the next is due by the clock. Raises CheckpointError on
        all ranks where the run may not continue.
        """
        mine, now_s = self._mine, time.monotonic()
        mine.clock_s = now_s - self._begun_s
        mine.step_s = (now_s - self._looked_s) / max(1, step - (self._looked_step or 0))
        everyone = self._comm.allgather_object(mine, name="checkpoint.look")
        self._looked_s, self._looked_step = now_s, step
        outcome = self._settled(everyone)
        return outcome, self._schedule(step, everyone[0])

    def wait(self) -> Outcome | None:
        """Let all ranks wait for the end of the checkpoint under way. Returns how it ended; None where nothing was."""
        outcome = None
        while self.is_writing:
            outcome = self._settled(self._comm.allgather_object(self._mine, name="checkpoint.look"))
            if outcome is None:
                time.sleep(_WAIT_S)
        return outcome

    def close(self) -> None:
        """End the checkpoint under way: a rank alone publishes it, one of several leaves it: others may be gone."""
        if self._comm.size == 1:
            with contextlib.suppress(CheckpointError):
                self.wait()
        elif self._thread is not None:
            self._thread.join(_PATIENCE_S)

    def _prepared(self, step: int, trained: Engine) -> tuple[dict[str, Mapping[str, Tensor]], str]:
        """Returns the parts to write, or the reason of a failure: the other ranks wait for it."""
        content: dict[str, Mapping[str, Tensor]] = {}
        try:
            if self._comm.rank == 0:
                if self._place.has(step):
                    return {}, _THERE
                content[DENSE] = trained.dense_state()
            content[ROWS.format(rank=self._comm.rank, ranks=self._comm.size)] = trained.shard_state()
        except Exception as failure:
            return {}, _text(failure)
        return content, ""

    def _with_copies(self, step: int, content: Mapping[str, Mapping[str, Tensor]]) -> Callable[[], None]:
        """Copies now; returns the remaining work. Where there is no memory after all, it says so when ranks look."""
        try:
            for name, tensors in content.items():
                self._copies[name] = copied(tensors, self._copies.get(name, {}))
        except RuntimeError as failure:
            self._mine = _Progress(error=_text(failure))
            return lambda: None
        return lambda: self._write(step, self._copies)

    def _write(self, step: int, content: Mapping[str, Mapping[str, Tensor]]) -> None:
        with self._noted():
            self._mine.parts = {name: self._place.write(step, name, each) for name, each in content.items()}

    def _published(self, state: CheckpointState, parts: Mapping[str, WrittenPart], keep: int, best: int | None) -> None:
        with self._noted():
            self._before_publishing()
            self._place.commit(state.step, parts, state_bytes(state, parts), keep, best)

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        """Note the end of a block as that of this rank's part, and its error."""
        progress = self._mine
        try:
            yield
        except Exception as failure:
            progress.error = _text(failure)
            if not isinstance(failure, _FAILURES):
                progress.fatal = failure if isinstance(failure, CheckpointError) else CheckpointError(progress.error)
        progress.is_busy = False  # last, as the step's thread looks at it

    def _settled(self, everyone: list[_Progress]) -> Outcome | None:
        """Take the next step that the progress of all ranks allows: the same on each of them."""
        step = self._step
        if step is None or any(each.is_busy for each in everyone):
            return None
        for each in everyone:
            if each.fatal is not None:
                raise each.fatal
        rank = "rank {}: ".format if self._comm.size > 1 else lambda _: ""
        failed = [f"{rank(place)}{each.error}" for place, each in enumerate(everyone) if each.error]
        if failed or self._is_publishing:
            self._place.end(failed=not self._is_publishing)
            self._step, self._mine, self._is_publishing = None, _Progress(), False
            return Outcome(step, failed[0] if failed else "")
        self._is_publishing = True
        if self._comm.rank == 0:
            self._mine.is_busy = True
            parts = {name: part for each in everyone for name, part in each.parts.items()}
            self._thread = _in_thread(lambda: self._publish(parts))
        return None

    def _schedule(self, step: int, of_rank_0: _Progress) -> bool:
        """Choose the step after which all look again, by the clock of rank 0; return whether a checkpoint is due."""
        step_s = max(of_rank_0.step_s, 1e-6)
        left_s = 0.0 if self._every_s is None else self._every_s - of_rank_0.clock_s
        # Half of what is left: so many looks a minute as it has powers of two of a step, and a slower step is noticed.
        wait_s = _LOOK_EVERY_S if self.is_writing else left_s / 2
        self._next_look = step + max(1, int(wait_s / step_s))
        return self._every_s is not None and not self.is_writing and left_s < step_s / 2


def state_bytes(state: CheckpointState, parts: Mapping[str, WrittenPart]) -> bytes:
    """Format state.json of these parts."""
    return seal(state.model_copy(update={"files": {name: part.digest for name, part in parts.items()}}))


class _Ready(NamedTuple):
    """A rank's answer when a checkpoint begins: why it cannot, or the memory that its copy takes."""

    error: str
    host: str
    needed_bytes: int
    free_bytes: int


def _fits(everyone: list[_Ready]) -> bool:
    """Whether the copies of all ranks of each machine take at most half of what is free there."""
    for host in {each.host for each in everyone}:
        here = [each for each in everyone if each.host == host]
        if sum(each.needed_bytes for each in here) > min(each.free_bytes for each in here) // 2:
            return False
    return True


def _text(error: BaseException) -> str:
    known = str(error) if isinstance(error, OSError | StorageError | CheckpointError) else ""
    return known or f"{type(error).__name__}: {error}"


def _in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, name="checkpoint", daemon=True)
    thread.start()
    return thread


def end_with(comm: Comm, into: CheckpointPlace, step: int, trained: Engine, cache_dir: str | None = None) -> Checkpoint:
    """Put the checkpoint of `step` into `trained` and remove those of later steps, so that it is the latest one."""
    checkpoint = comm.on_rank_0(partial(into.at, step))
    load(comm, checkpoint, read_state(checkpoint), trained, cache_dir)
    with comm.agreed(), saying("remove the checkpoints after", checkpoint):
        if comm.rank == 0:
            into.remove(conflicting_checkpoints(into.run, checkpoint))
    return checkpoint
