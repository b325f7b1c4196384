"""Files that are published together: numbered versions of an address, each made by one exclusive create for ever.

    ADDRESS/
      versions/00000000000000000003.json         version 3: its files by name; creating it is the publication
      files/day=2026-03-20-000-<random>.parquet  what versions name; never written twice

For object stores, which cannot exchange a folder in one step as a disk can. A version keeps a file of the one before it
by naming the same path, so nothing is copied, and files that lay at the address before may be named as they lie. Who
reads takes the newest version once, and has the files of that one; an address without versions is a plain folder.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featurestore.published.versions import (
        FILES,
        VERSIONS,
        PublishedFile,
        PublishedFiles,
        PublishedVersion,
        expire,
        missing,
        open_published,
        publish,
        upload,
        write_part,
    )

__all__ = [
    "FILES",
    "VERSIONS",
    "PublishedFile",
    "PublishedFiles",
    "PublishedVersion",
    "expire",
    "missing",
    "open_published",
    "publish",
    "upload",
    "write_part",
]

_MODULES = ("versions",)


def __getattr__(name: str) -> Any:
    """Load the public names when the first of them is asked for: `paths` needs none, and commands import it early."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in _MODULES:
        here = vars(importlib.import_module(f"{__name__}.{module}"))
        globals().update({each: here[each] for each in __all__ if each in here})
    return globals()[name]
