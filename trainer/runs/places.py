"""The place of a run's checkpoints, on a disk or an object store: parts, and versions that name all that count.

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

A run begins by a version of its own. So of two that write to one place, the one that began last continues, and the
other one is refused at its next checkpoint. Files that the newest version does not name are removed at once on a disk,
which has to have room for one checkpoint more than are kept; an object store keeps them for `KEEP_REMOVED_S`, for
readers that hold an earlier version.
"""

import contextlib
import json
import os
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
import xxhash
from torch import Tensor

from featurestore.errors import CommitConflictError, StorageError
from featurestore.lookup.cache import RUNS, default_cache_dir
from featurestore.published.paths import FarPath, RunPath
from featurestore.published.versions import (
    PublishedFile,
    PublishedFiles,
    PublishedVersion,
    expire,
    missing,
    open_published,
    part_path,
    publish,
    write_part,
)
from featurestore.storage.local import claim
from featurestore.storage.storage import Storage, digest_of
from trainer.errors import CheckpointError, DamagedCheckpointError
from trainer.files import checkpoints_of
from trainer.runs.folder import STATE, Checkpoint, step_name, step_of

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
def local_copy(
    checkpoint: Checkpoint, file: str, digest: str, cache_dir: str | os.PathLike[str] | None = None
) -> Iterator[Path]:
    """Give a file of this machine with the content of a checkpoint's file: itself, or a copy in the cache folder.

    The copy is there for the block, and is verified: `digest` is the xxh3-128 that it has to have. A file of a disk is
    not looked at. Raises DamagedCheckpointError for another one, or where the file is gone, OSError, StorageError.
    """
    if checkpoint.files.is_local:
        yield Path(checkpoint.path(file))
        return
    with tempfile.NamedTemporaryFile(dir=_cache(cache_dir), prefix=".tmp-", suffix=f"-{file}") as copy:
        found = xxhash.xxh3_128()
        try:
            with checkpoint.open_input(file) as content:
                while block := content.read(_BLOCK_BYTES):
                    found.update(block)
                    copy.write(block)
        except FileNotFoundError as failure:
            raise DamagedCheckpointError(f"{checkpoint}/{file} is missing") from failure
        copy.flush()
        if found.hexdigest() != digest:
            raise DamagedCheckpointError(f"{checkpoint}/{file} is damaged: its digest is not the one in state.json")
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


def write_tensors(file: IO[bytes], tensors: Mapping[str, Tensor]) -> None:
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


DAMAGED = "damaged-"
"""Before the name of a checkpoint: a run has found it damaged and keeps it; no reader takes it for a checkpoint."""
KEEP_REMOVED_S = 600.0
"""How long checkpoints on an object store can still be read after their removal."""
EXPIRE_EVERY_S = 60.0
"""It reads all versions of the last minutes."""


@dataclass(frozen=True)
class WrittenPart:
    """One file of a checkpoint that is not published yet: the xxh3-128 of its bytes, and where it lies."""

    digest: str
    file: PublishedFile


Content = Mapping[str, Tensor] | PackedTensors
_NONE = PublishedVersion(version=0, publication="", writer="", time_s=0.0, files={})


class CheckpointPlace:
    """Where the checkpoints of the run in folder `run` are published; `storage` has their files, if it is given.

    Every rank writes its own parts; all else is for rank 0.
    """

    def __init__(self, run: RunPath, storage: Storage | None = None) -> None:
        self.run = run
        self._storage = storage or Storage(str(checkpoints_of(run)))
        self._known: PublishedVersion | None = None
        self._written: list[str] = []
        self._next_expiry_s = 0.0
        self._tried: set[str] = set()
        """Publications of this run; of some it may not know whether they were made, as an answer may be lost."""

    def has(self, step: int) -> bool:
        """Tell whether the checkpoint of that step is there, whole."""
        return f"{step_name(step)}/{STATE}" in self._newest_known().files

    def address(self, step: int) -> str:
        """Give the address of the checkpoint of a step, there or not."""
        return f"{checkpoints_of(self.run)}/{step_name(step)}"

    def at(self, step: int) -> Checkpoint:
        """Give the checkpoint of a step, which is there."""
        return Checkpoint(self.run, step_name(step), PublishedFiles(self._storage.url, self._newest_known()))

    def write(self, step: int, name: str, content: Content) -> WrittenPart:
        """Write one part, where nobody sees it yet. Raises StorageError.

        On a disk, tensors go there one by one, without a copy of all, and the digest is of what it gives back."""
        name = f"{step_name(step)}-{name}"
        if not self._storage.is_local:
            packed = content if isinstance(content, PackedTensors) else PackedTensors().pack(content)
            return WrittenPart(xxhash.xxh3_128_hexdigest(packed.data), write_part(self._storage, name, packed.data))
        path = part_path(name)
        self._written.append(path)
        with self._storage.open_output(path) as file:
            if isinstance(content, PackedTensors):
                file.write(content.data)
            else:
                write_tensors(file, content)
        size_bytes = self._storage.size(path)
        return WrittenPart(digest_of(self._storage, path), PublishedFile(path=path, size_bytes=size_bytes))

    def end(self, *, failed: bool) -> None:
        """End a checkpoint on this rank: where it `failed` before all parts were written, a disk gets their room back.

        Those of a rank that was killed are removed when a run begins."""
        if failed:
            with contextlib.suppress(StorageError):
                self._storage.delete_files(self._written)
        self._written.clear()

    def commit(self, step: int, parts: Mapping[str, WrittenPart], state: bytes, keep: int, best: int | None) -> None:
        """Publish a checkpoint of these parts, and remove all but the newest `keep` and that of step `best`.

        One that somebody has removed a file of is not named any more. Raises StorageError, and CheckpointError where
        another start of the run has taken over."""
        stem = step_name(step)
        added = {STATE: write_part(self._storage, f"{stem}-{STATE}", state)}
        added |= {name: part.file for name, part in parts.items()}
        files = self._whole() | {f"{stem}/{name}": file for name, file in added.items()}
        damaged = {each for each in map(_stem, files) if each.startswith(DAMAGED)}
        steps = sorted({*map(_stem, files)} - damaged, key=step_of)
        kept = {*steps[-keep:], *damaged, *([] if best is None else [step_name(best)])}
        self._publish({name: file for name, file in files.items() if _stem(name) in kept})
        self._expire()

    def remove(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Remove checkpoints, all of them at once. Raises StorageError, CheckpointError."""
        if not checkpoints:
            return
        gone = {each.name for each in checkpoints}
        self._publish({name: file for name, file in self._whole().items() if _stem(name) not in gone})
        self._expire()

    def claim(self, damaged: Sequence[Checkpoint] = ()) -> None:
        """Become the one that writes here, and put these damaged checkpoints aside.

        They are kept under names that nothing takes for a checkpoint (`DAMAGED` before theirs), in the place of those
        kept so before. Raises StorageError, CheckpointError.
        """
        self._known = None
        files = self._newest_known().files
        gone = set(missing(self._storage, files.values()))  # nothing could be published with them
        aside = {each.name for each in damaged} | {_stem(name) for name, file in files.items() if file.path in gone}
        self._publish(
            {
                f"{DAMAGED}{name}" if _stem(name) in aside else name: file
                for name, file in files.items()
                if file.path not in gone and not (aside and name.startswith(DAMAGED))
            }
        )
        self._expire()

    def _whole(self) -> dict[str, PublishedFile]:
        """The files of those that have all of theirs."""
        files = self._newest_known().files
        gone = set(missing(self._storage, files.values()))
        lacking = {_stem(name) for name, file in files.items() if file.path in gone}
        return {name: file for name, file in files.items() if _stem(name) not in lacking}

    def _expire(self) -> None:
        """Remove what no version names; only after a version of this run, as parts of others may be among that."""
        if self._storage.is_local:
            expire(self._storage, KEEP_REMOVED_S, files_at_once=True)
        elif time.monotonic() >= self._next_expiry_s:
            expire(self._storage, KEEP_REMOVED_S)
            self._next_expiry_s = time.monotonic() + EXPIRE_EVERY_S

    def _newest(self) -> PublishedVersion:
        """The newest version that is there now."""
        newest = open_published(self._storage.url)
        return newest.published if isinstance(newest, PublishedFiles) else _NONE

    def _newest_known(self) -> PublishedVersion:
        """The version for the next one to come after: that which was the newest at the first look, or was made here."""
        if self._known is None:
            self._known = self._newest()
        return self._known

    def _publish(self, files: Mapping[str, PublishedFile]) -> None:
        """Publish the next version after the one that is known. Raises StorageError, CheckpointError."""
        publication = uuid.uuid4().hex
        self._tried.add(publication)
        known = self._newest_known()
        try:
            self._known = publish(self._storage, files, after=known.version, publication=publication)
        except CommitConflictError as failure:
            found = self._newest()
            if found.version == known.version:  # a file is gone
                raise StorageError(str(failure)) from failure
            if found.publication not in self._tried:
                raise self._taken_over(found) from failure
            self._known = found
            if dict(found.files) != dict(files):  # an earlier one of mine, whose answer was lost
                self._publish(files)

    def _taken_over(self, by: PublishedVersion) -> CheckpointError:
        writer = f", {by.writer}" if by.writer else ""
        return CheckpointError(
            f"{checkpoints_of(self.run)} is written to by another start of this run{writer}: that one continues, and "
            "this one ends; start one alone, or choose another run.name"
        )


def _stem(name: str) -> str:
    """The checkpoint that a file is of."""
    return name.partition("/")[0]
