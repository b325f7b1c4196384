"""How many bytes this process has written into stores, whatever became of the files since."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import IO, Any

from distributed import Client

from featurestore.storage.storage import Storage

_written = [0]


def written_bytes(client: Client) -> int:
    """Count the bytes that this process and the workers have written since `count_writes`."""
    counts: Mapping[str, int] = client.run(_written_here)
    return _written_here() + sum(counts.values())


def count_writes(client: Client) -> None:
    """Begin to count, here and in the workers of now."""
    _count_here()
    client.run(_count_here)


def _written_here() -> int:
    return _written[0]


def _count_here() -> None:
    open_output, create_exclusive = Storage.open_output, Storage.create_exclusive

    @contextlib.contextmanager
    def counted_output(self: Storage, path: str) -> Iterator[IO[bytes]]:
        with open_output(self, path) as file:
            yield file
            _written[0] += file.seek(0, os.SEEK_END)

    def counted_create(self: Storage, path: str, data: bytes) -> bool:
        _written[0] += len(data)
        return create_exclusive(self, path, data)

    patched: Any = Storage
    patched.open_output, patched.create_exclusive = counted_output, counted_create
