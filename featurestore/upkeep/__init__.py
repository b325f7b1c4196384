"""Maintenance of a store: its history, its size, its checks and repairs, its dtype.

Modules load when they are first asked for: a command's --help needs none of them.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from featurestore.upkeep import compaction, expiry, history, purge, remake, verify

__all__ = ["compaction", "expiry", "history", "purge", "remake", "verify"]

DATA, DAMAGED = "data", "damaged"
"""Folders of the data files, and of damaged files that a repair has replaced."""
KEEP_LAST, KEEP_DAYS, GRACE_DAYS = 10, 30.0, 7.0
"""Defaults of an expiry: number of last snapshots, days with all snapshots, and days with one snapshot a day."""


def __getattr__(name: str) -> ModuleType:
    """Load a module of this package."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
