"""Files to read are regular ones: another is refused at once, and no other process is waited for."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from featurestore.storage.local import IrregularFileError, open_regular, read_regular, read_text
from featurestore.storage.storage import Storage, StorageError

DOORS: list[Callable[[Path], object]] = [open_regular, read_regular, read_text]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("door", DOORS)
def test_a_pipe_or_a_device_is_refused(door: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for place in (tmp_path / "pipe", tmp_path / "link", Path("/dev/null")):
        with pytest.raises(IrregularFileError, match=r"not a regular file \(pipe, socket or device\)$"):
            door(place)


@pytest.mark.parametrize("door", DOORS)
def test_other_places_raise_what_open_raises(door: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        door(tmp_path / "none")
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        door(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        with pytest.raises(OSError, match=r"socket"):
            door(tmp_path / "socket")


def test_files_and_links_to_them_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes("é\r\nb\rc\n".encode())
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        assert read_regular(tmp_path / name) == "é\r\nb\rc\n".encode()
        assert read_text(tmp_path / name) == "é\nb\nc\n"


@pytest.mark.timeout(20)
def test_a_storage_reads_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    storage = Storage(tmp_path)
    for read in (
        storage.read_bytes,
        storage.open_input,
        storage.entry,
        lambda path: storage.read_into(path, memoryview(bytearray(1))),
    ):
        with pytest.raises(StorageError, match="not a regular file"):
            read("pipe")
