"""Samples by day: the days that the files' names tell, whichever split the files are in."""

import contextlib
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from typing import TypeVar

from featurestore.storage.storage import Storage
from trainer.errors import DataNotFoundError

SPLITS = ("train", "test")
ResultT = TypeVar("ResultT")
_NAME = re.compile(r"day=(\d{4}-\d{2}-\d{2})(?!\d)")


def sample_files(storage: Storage, split: str) -> list[str]:
    """List the Parquet files of a split, in the order of their names."""
    return sorted(f"{split}/{name}" for name in storage.list(split) if name.endswith(".parquet"))


def files_by_day(storage: Storage) -> dict[str, list[str]]:
    """List the files of each day, written 2026-01-31, by the beginning of their names, day=; days ascending."""
    found: dict[str, list[str]] = {}
    for file in [each for split in SPLITS for each in sample_files(storage, split)]:
        if match := _NAME.match(name_of(file)):
            found.setdefault(match[1], []).append(file)
    return dict(sorted(found.items()))


def files_of(storage: Storage, days: Sequence[str]) -> list[str]:
    """List the files of these days. Raises DataError where one has none."""
    by_day = files_by_day(storage) if days else {}
    if lacking := sorted(set(days) - by_day.keys()):
        known = f"from {min(by_day)} to {max(by_day)}" if by_day else "not named by day, as day=2026-01-31.parquet"
        raise DataNotFoundError(
            f"{storage.url} has no samples of {', '.join(lacking)}: its files are {known}; "
            "change data.train_days or data.test_days, or write the samples with: python jobs/build_samples.py"
        )
    return [file for day in sorted(set(days)) for file in by_day[day]]


def newest_day(files: Iterable[str]) -> date | None:
    """Find the last day that the names of the files tell; None where one of them tells none, or there are none."""
    found = [_NAME.match(name_of(file)) for file in files]
    days = [date.fromisoformat(match[1]) for match in found if match]
    return max(days) if days and len(days) == len(found) else None


def name_of(file: str) -> str:
    """Drop the split from a file's name: files move from test/ to train/ as days go by, and stay the same."""
    return file.partition("/")[2]


def in_either_split(read: Callable[[str], ResultT], file: str) -> ResultT:
    """Call `read` with a file's place, or where it is gone, with its place in the other split.

    A day that is added to a folder while a run reads it moves an earlier one from test/ to train/, bytes and all.
    Raises what `read` does.
    """
    try:
        return read(file)
    except FileNotFoundError:
        for split in SPLITS:
            with contextlib.suppress(FileNotFoundError):
                return read(f"{split}/{name_of(file)}")
        raise
