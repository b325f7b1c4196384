"""Places of checkpoints: on a disk or at an object store, their files packed.

On a disk, parts are written into a hidden folder, which is renamed when all are there (`trainer.runs.checkpoint`). On
an object store, each part has a place of its own, and a new version of the address `RUN/checkpoints` names all that
count (`featurestore.published`): creating that version, after the one that this run made last, is the commit.

    s3://bucket/runs/a/
      config.yaml report.json ids.parquet tensorboard/…    plain files, each replaced as a whole
      checkpoints/
        versions/00000000000000000012.json                 step-00000050/state.json, … and where they lie
        files/state-<random>.json files/dense-<random>.safetensors files/rows-00000-of-00002-<random>.safetensors

A run begins by a version of its own. So of two that write to one address, the one that began last continues, and the
other one is refused at its next checkpoint. What a version no longer names stays for `KEEP_REMOVED_S`, for readers that
hold an earlier one.
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash
from torch import Tensor

from featurestore.console.files import replace_file
from featurestore.errors import CommitConflictError
from featurestore.log import writer_name
from featurestore.lookup.cache import RUNS, default_cache_dir, digest_of_file
from featurestore.published.paths import DAMAGED, FarPath, RunPath
from featurestore.published.versions import (
    PublishedFile,
    PublishedFiles,
    PublishedVersion,
    expire,
    missing,
    open_published,
    publish,
    write_part,
)
from featurestore.storage.local import claim, read_regular, sync
from featurestore.storage.storage import Storage
from trainer.errors import CheckpointError, DamagedCheckpointError
from trainer.runs.folder import finished, place, remove, step_of

_BLOCK_BYTES = 8 << 20


def local_folder(path: RunPath, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return a folder of this machine for what belongs to a run: its own, or of an address one in the cache folder."""
    if not isinstance(path, FarPath):
        return path
    folder = _cache(cache_dir) / f"{path.name}-{xxhash.xxh3_64_hexdigest(path.url.encode())}"
    folder.mkdir(exist_ok=True)
    return folder


def upload_new(folder: Path, names: tuple[str, ...], to: RunPath, known: dict[str, int]) -> None:
    """Copy files of these folders below `folder` to an address, but for those whose size is that in `known`.

    Does nothing where the run is on a disk. Raises OSError, StorageError."""
    if not isinstance(to, FarPath):
        return
    storage = Storage(to.url)
    for file in sorted(each for name in names for each in (folder / name).rglob("*") if each.is_file()):
        name, data = str(file.relative_to(folder)), file.read_bytes()
        if known.get(name) != len(data):
            storage.write_bytes(name, data)
            known[name] = len(data)


@contextlib.contextmanager
def local_copy(path: RunPath, digest: str, cache_dir: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Give a file of this machine with the content of `path`: itself, or a copy in the cache folder for the block.

    `digest`: the xxh3-128 that a copy has to have; a file of a disk is not looked at. Raises DamagedCheckpointError for
    another one, or where the file is gone, OSError, StorageError.
    """
    if not isinstance(path, FarPath):
        yield path
        return
    with tempfile.NamedTemporaryFile(dir=_cache(cache_dir), prefix=".tmp-", suffix=f"-{path.name}") as copy:
        found = xxhash.xxh3_128()
        try:
            with path.open_input() as file:
                while block := file.read(_BLOCK_BYTES):
                    found.update(block)
                    copy.write(block)
        except FileNotFoundError as failure:
            raise DamagedCheckpointError(f"{path} is missing") from failure
        copy.flush()
        if found.hexdigest() != digest:
            raise DamagedCheckpointError(f"{path} is damaged: its digest is not the one in state.json")
        yield Path(copy.name)


def _cache(cache_dir: str | os.PathLike[str] | None) -> Path:
    folder = Path(cache_dir or default_cache_dir())
    claim(folder)
    claim(folder / RUNS)
    return folder / RUNS


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


class PackedTensors:
    """The bytes of one safetensors file. Packing as many bytes again takes the same memory.

    Library calls that write such files copy all tensors first, and again into the file's bytes; this copies each tensor
    once, to its place, at the speed of memory.
    """

    def __init__(self) -> None:
        self.data = bytearray()
        """The file's bytes, until the next `pack`."""

    def pack(self, tensors: Mapping[str, Tensor]) -> "PackedTensors":
        """Copy the tensors, on whichever device; afterwards they may change. Raises MemoryError."""
        beginning, ordered = _laid_out(tensors)
        start = len(beginning)
        if len(self.data) != (size := start + packed_bytes(tensors)):
            self.data = bytearray()  # gone before the new one is made
            self.data = bytearray(size)
        self.data[:start] = beginning
        for tensor in ordered:
            if tensor.numel():
                target = torch.frombuffer(self.data, dtype=tensor.dtype, count=tensor.numel(), offset=start)
                target.view(tensor.shape).copy_(tensor.detach())
            start += tensor.nbytes
        return self


def packed_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return about how many bytes the tensors take when they are packed."""
    return sum(tensor.nbytes for tensor in tensors.values())


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """Write the bytes that `PackedTensors` would hold. No more than one tensor is copied at a time. Raises OSError."""
    beginning, ordered = _laid_out(tensors)
    file.write(beginning)
    for tensor in ordered:
        if tensor.numel():
            copied = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
            file.write(copied.view(-1).view(torch.uint8).numpy().data)


def _laid_out(tensors: Mapping[str, Tensor]) -> tuple[bytes, list[Tensor]]:
    """Return what comes before the numbers, the header's length and the header in JSON, and the tensors in order."""
    header: dict[str, dict[str, object]] = {}
    offset = 0
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in ordered:
        end = offset + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, [tensor for _, tensor in ordered]


STATE = "state.json"
KEEP_REMOVED_S = 600.0
"""How long checkpoints on an object store can still be read after their removal."""
EXPIRE_EVERY_S = 60.0
"""It reads all versions of the last minutes."""


@dataclass(frozen=True)
class WrittenPart:
    """One file of a checkpoint that is not published yet.

    It has the xxh3-128 of its bytes and, on an object store, its place.
    """

    digest: str
    file: PublishedFile | None = None


Content = Mapping[str, Tensor] | PackedTensors


class CheckpointPlace(ABC):
    """Where checkpoints are published. `begin`, `commit`, `claim` are for rank 0; every rank writes its own parts."""

    folder: RunPath

    def path(self, step: int) -> RunPath:
        """Give the path of the checkpoint of a step."""
        return place(self.folder, step)

    def has(self, step: int) -> bool:
        """Tell whether the checkpoint of that step is there, whole."""
        return self.path(step).is_dir()

    @abstractmethod
    def begin(self, step: int) -> None:
        """Make room for the parts of a step, and remove what a killed save has left. Raises OSError."""

    @abstractmethod
    def write(self, step: int, name: str, content: Content) -> WrittenPart:
        """Write one part, where nobody sees it yet. Raises OSError, StorageError."""

    @abstractmethod
    def commit(self, step: int, parts: Mapping[str, WrittenPart], state: bytes, keep: int, best: int | None) -> RunPath:
        """Publish a checkpoint of these parts, and remove all but the newest `keep` and that of step `best`.

        Raises OSError, StorageError, and CheckpointError where another start of the run has taken over."""

    @abstractmethod
    def remove(self, paths: Sequence[RunPath]) -> None:
        """Remove checkpoints, given oldest first. Raises OSError, StorageError."""

    @abstractmethod
    def claim(self, damaged: Sequence[RunPath] = ()) -> None:
        """Become the one that writes here, and put these damaged checkpoints aside.

        They are given newest first, and kept under names that nothing takes for a checkpoint (`DAMAGED` before theirs),
        in the place of those kept so before.

        Raises OSError, StorageError, CheckpointError.
        """


def place_of(folder: RunPath) -> CheckpointPlace:
    """Return the place of the checkpoints in a folder or at an address."""
    return FarPlace(folder) if isinstance(folder, FarPath) else DiskPlace(folder)


class DiskPlace(CheckpointPlace):
    """A folder of checkpoints on a local or shared disk; RUN/.writer names the start that writes to it."""

    def __init__(self, folder: Path) -> None:
        self.folder: Path = folder
        self._writer = folder.parent / ".writer"
        self._mine: bytes | None = None

    def begin(self, step: int) -> None:
        self._check_mine()
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover)
        self._hidden(step).mkdir(parents=True)

    def write(self, step: int, name: str, content: Content) -> WrittenPart:
        path = self._hidden(step) / name
        with path.open("wb") as file:
            if isinstance(content, PackedTensors):
                file.write(content.data)
            else:
                write_tensors(file, content)
        sync(path)
        return WrittenPart(digest_of_file(path))  # of what the disk gives back

    def commit(self, step: int, parts: Mapping[str, WrittenPart], state: bytes, keep: int, best: int | None) -> RunPath:
        hidden, final = self._hidden(step), place(self.folder, step)
        self._check_mine()
        (hidden / STATE).write_bytes(state)
        sync(hidden / STATE)
        sync(hidden)
        hidden.rename(final)
        sync(self.folder)
        remove([old for old in finished(self.folder)[:-keep] if best is None or old != place(self.folder, best)])
        return final

    def remove(self, paths: Sequence[RunPath]) -> None:
        remove([path for path in paths if isinstance(path, Path)])

    def claim(self, damaged: Sequence[RunPath] = ()) -> None:
        self._mine = f"{writer_name()} {uuid.uuid4().hex}\n".encode()
        self._writer.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._writer, self._mine)
        if not damaged:
            return
        for kept in self.folder.glob(f"{DAMAGED}*"):
            shutil.rmtree(kept)
        for each in damaged:
            with contextlib.suppress(FileNotFoundError):  # not damaged, but removed
                (self.folder / each.name).rename(self.folder / f"{DAMAGED}{each.name}")
            sync(self.folder)

    def _check_mine(self) -> None:
        if self._mine is None:
            return
        found = read_regular(self._writer) if self._writer.exists() else b""
        if found != self._mine:
            raise _taken_over(self.folder, found.decode(errors="replace").partition(" ")[0])

    def _hidden(self, step: int) -> Path:
        return self.folder / f".{place(self.folder, step).name}"


def _taken_over(folder: RunPath, writer: str) -> CheckpointError:
    by = f", {writer}" if writer else ""
    return CheckpointError(
        f"{folder} is written to by another start of this run{by}: that one continues, and this one ends; start one "
        "alone, or choose another run.name"
    )


class FarPlace(CheckpointPlace):
    """The published address of checkpoints on an object store; `storage` has its files, if it is given."""

    def __init__(self, folder: FarPath, storage: Storage | None = None) -> None:
        self.folder: FarPath = folder
        self._storage = storage or Storage(folder.url)
        self._version: int | None = None
        self._files: dict[str, PublishedFile] = {}
        self._next_expiry_s = 0.0
        self._tried: set[str] = set()
        """Publications of this run; of some it may not know whether they were made, as an answer may be lost."""

    def has(self, step: int) -> bool:
        if self._version is None:
            self._look()
        return f"{self.path(step).name}/{STATE}" in self._files

    def begin(self, step: int) -> None:
        pass

    def write(self, step: int, name: str, content: Content) -> WrittenPart:
        packed = content if isinstance(content, PackedTensors) else PackedTensors().pack(content)
        return WrittenPart(xxhash.xxh3_128_hexdigest(packed.data), write_part(self._storage, name, packed.data))

    def commit(self, step: int, parts: Mapping[str, WrittenPart], state: bytes, keep: int, best: int | None) -> RunPath:
        if self._version is None:
            self._look()
        stem, published = place(self.folder, step).name, write_part(self._storage, STATE, state)
        added = {f"{stem}/{name}": part.file for name, part in parts.items() if part.file is not None}
        files = {**self._files, **added, f"{stem}/{STATE}": published}
        stems = {name.partition("/")[0] for name in files}
        damaged = {each for each in stems if each.startswith(DAMAGED)}
        steps = sorted(stems - damaged, key=lambda name: step_of(self.folder / name))
        kept = {*steps[-keep:], *damaged, *([] if best is None else [place(self.folder, best).name])}
        self._publish({name: file for name, file in files.items() if name.partition("/")[0] in kept})
        if time.monotonic() >= self._next_expiry_s:
            expire(self._storage, KEEP_REMOVED_S)
            self._next_expiry_s = time.monotonic() + EXPIRE_EVERY_S
        return self.path(step)

    def path(self, step: int) -> RunPath:
        return FarPath(place(self.folder, step).url)

    def remove(self, paths: Sequence[RunPath]) -> None:
        if not paths:
            return
        if self._version is None:
            self._look()
        gone = {path.name for path in paths}
        self._publish({name: file for name, file in self._files.items() if name.partition("/")[0] not in gone})

    def claim(self, damaged: Sequence[RunPath] = ()) -> None:
        self._look()
        gone = set(missing(self._storage, self._files.values()))  # nothing could be published with them
        stem_of = {name: name.partition("/")[0] for name in self._files}
        aside = {each.name for each in damaged}
        aside |= {stem_of[name] for name, file in self._files.items() if file.path in gone}
        self._publish(
            {
                f"{DAMAGED}{name}" if stem_of[name] in aside else name: file
                for name, file in self._files.items()
                if file.path not in gone and not (aside and name.startswith(DAMAGED))
            }
        )

    def _newest(self) -> PublishedVersion | None:
        newest = open_published(self.folder.url)
        return newest.published if isinstance(newest, PublishedFiles) else None

    def _look(self) -> None:
        """Take the newest version for the one to come after."""
        found = self._newest()
        self._version = found.version if found else 0
        self._files = dict(found.files) if found else {}

    def _publish(self, files: Mapping[str, PublishedFile]) -> None:
        """Publish the next version after the one that is known. Raises StorageError, CheckpointError."""
        publication = uuid.uuid4().hex
        self._tried.add(publication)
        try:
            mine = publish(self._storage, files, after=self._version, publication=publication)
            self._version, self._files = mine.version, dict(mine.files)
        except CommitConflictError as failure:
            found = self._newest()
            if found is None or found.publication not in self._tried:
                raise _taken_over(self.folder, found.writer if found else "") from failure
            self._version, self._files = found.version, dict(found.files)
            if self._files != dict(files):  # an earlier one of mine, whose answer was lost
                self._publish(files)
