"""A folder in the place of HDFS: fsspec's wrapper of pyarrow's file systems, with that of the disk behind it."""

from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from featurestore.storage import remote


def folder_as_hdfs(folder: Path, patch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Let hdfs:// be a folder; return how it was opened."""
    opened: list[dict[str, object]] = []

    def of_folder(protocol: str, **options: object) -> ArrowFSWrapper:
        opened.append({"protocol": protocol, **options})
        return ArrowFSWrapper(SubTreeFileSystem(str(folder), LocalFileSystem()), skip_instance_cache=True)

    patch.setattr(fsspec, "filesystem", of_folder)
    patch.setattr(remote, "_clients", {})
    return opened
