"""What an address asks for: whole numbers, words out of a few, and days, checked; and pages of a long list."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request

from explorer.errors import ExplorerError, NotHereError
from featurestore.published.channels import VersionName, version_name

LARGEST = (1 << 63) - 1


@dataclass(frozen=True)
class Paging:
    """One page of a long list: its number, from 1 on, the number of pages, and which items it has."""

    page: int
    num_pages: int
    first: int
    count: int

    @classmethod
    def of(cls, request: Request, count: int, per_page: int) -> "Paging":
        """Cut `count` items into pages, and find the one that is asked for; the last one where it lies beyond."""
        num_pages = max(1, -(-count // per_page))
        page = min(whole(request, "page", 1, least=1) or 1, num_pages)
        return cls(page, num_pages, (page - 1) * per_page, count)


def whole(request: Request, name: str, default: int | None = None, *, least: int = 0) -> int | None:
    """Read a whole number; `default` where none is given. Raises ExplorerError for anything else."""
    text = request.query_params.get(name, "")
    return whole_in(text, name, least=least) if text else default


def whole_in(text: str, name: str, *, least: int = 0) -> int:
    """Read a whole number out of a text. Raises ExplorerError; NotHereError for one that is larger than any."""
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()) or (text != digits and least == 0):
        raise ExplorerError(f"{name} {text[:40]!r} is no whole number from {least:,} on")
    if len(digits) > 19 or not -LARGEST - 1 <= int(text) <= LARGEST:
        raise NotHereError(f"there is no {name} {text[:40]}")
    if int(text) < least:
        raise ExplorerError(f"{name} {text} is no whole number from {least:,} on")
    return int(text)


def number_of(text: str, of: str) -> int:
    """Read the number of a thing in an address, from 0 on; `of` names the thing, e.g. "ad". Raises NotHereError."""
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise NotHereError(f"there is no {of} {text[:40]!r}: {of}s are numbered from 0 on")
    return int(text)


def snapshot(request: Request) -> VersionName | None:
    """Read the version of a snapshot, or a channel that points to one; None where the newest is asked for.

    Raises ExplorerError.
    """
    text = request.query_params.get("version", "")
    if not text or text[:1].isdigit() or text[:1] in "+-":
        return whole(request, "version")
    try:
        return version_name(text)
    except ValueError:
        raise ExplorerError(f"version {text[:40]!r} is no whole number from 0 on, and no name of a channel") from None


def choice(request: Request, name: str, choices: Sequence[str]) -> str:
    """Read one of some words; the first one where none is given. Raises ExplorerError for another."""
    text = request.query_params.get(name) or choices[0]
    if text not in choices:
        raise ExplorerError(f"{name} {text[:40]!r} is none of {', '.join(choices)}")
    return text


def day(request: Request, name: str) -> datetime.datetime | None:
    """Read a day, YYYY-MM-DD, or a time of it, in UTC; None where none is given. Raises ExplorerError."""
    text = request.query_params.get(name, "")
    if not text:
        return None
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ExplorerError(f"{name} {text[:40]!r} is no day; write it as 2026-11-27, or 2026-11-27T18:30") from None
    return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)
