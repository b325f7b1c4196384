"""Reading of regular files of this machine, directly or by a link: a pipe, a socket or a device could wait for ever."""

import errno
import io
import os
import stat
from pathlib import Path


class IrregularFileError(OSError):
    """What is at a path is no regular file; callers that report OSError report this too."""

    def __str__(self) -> str:
        return str(self.strerror)


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a file for reading, as `open` does; never waits for another process. Raises OSError."""
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - returned; Path has no opener
    try:
        check_mode(os.fstat(file.fileno()).st_mode)
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a file. Raises OSError."""
    with open_regular(path) as file:
        return file.read()


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a file in UTF-8, each line's end as \\n. Raises OSError, UnicodeDecodeError."""
    return read_regular(path).decode().replace("\r\n", "\n").replace("\r", "\n")


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise OSError where code that opens the file on its own would find none, or could wait."""
    mode = Path(path).stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    check_mode(mode)


def check_mode(mode: int) -> None:
    """Raise IrregularFileError unless a mode, of `stat`, is that of a regular file."""
    if not stat.S_ISREG(mode):
        raise IrregularFileError(errno.EINVAL, "no regular file but a pipe, a socket or a device")


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # changes nothing for regular files; a pipe opens at once
