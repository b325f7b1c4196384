"""Parameters of a request: those of its address, and the file of a form."""

import datetime
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from explorer.errors import NotHereError, RequestError
from explorer.problems import Problem
from featurestore.published.versions import VersionName, version_name

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
        """Divide `count` items into pages, and choose the requested page, or the last if it is beyond."""
        num_pages = max(1, -(-count // per_page))
        page = min(whole(request, "page", 1, least=1) or 1, num_pages)
        return cls(page, num_pages, (page - 1) * per_page, count)


def whole(request: Request, name: str, default: int | None = None, *, least: int = 0) -> int | None:
    """Read a whole number, or return `default` without one. Raises RequestError for anything else."""
    text = request.query_params.get(name, "")
    return whole_in(text, name, least=least) if text else default


def whole_in(text: str, name: str, *, least: int = 0) -> int:
    """Read a whole number from a text. Raises RequestError, or NotHereError if it is too large."""
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()) or (text != digits and least == 0):
        raise RequestError(Problem.NOT_WHOLE, name, text[:40], least)
    if len(digits) > 19 or not -LARGEST - 1 <= int(text) <= LARGEST:
        raise NotHereError(Problem.NONE_OF_NUMBER, name, text[:40])
    if int(text) < least:
        raise RequestError(Problem.NOT_WHOLE, name, text, least)
    return int(text)


def snapshot(request: Request) -> VersionName | None:
    """Read the version of a snapshot, or a channel that points to one; None for the newest.

    Raises RequestError.
    """
    text = request.query_params.get("version", "")
    if not text or text[:1].isdigit() or text[:1] in "+-":
        return whole(request, "version")
    try:
        return version_name(text)
    except ValueError:
        raise RequestError(Problem.NOT_VERSION, text[:40]) from None


def choice(request: Request, name: str, choices: Sequence[str]) -> str:
    """Read one of several words, by default the first. Raises RequestError for any other."""
    text = request.query_params.get(name) or choices[0]
    if text not in choices:
        raise RequestError(Problem.UNKNOWN_CHOICE, name, text[:40], ", ".join(choices))
    return text


def day(request: Request, name: str) -> datetime.datetime | None:
    """Read a day, YYYY-MM-DD, optionally with a time, in UTC, or return None. Raises RequestError."""
    text = request.query_params.get(name, "")
    if not text:
        return None
    try:
        found = datetime.datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=datetime.UTC)).astimezone(datetime.UTC)
    except (ValueError, OverflowError):  # the second: before the first year, or after the last
        raise RequestError(Problem.NOT_DAY, name, text[:40]) from None


_OTHER_BYTES = 100_000
"""Bytes of a form besides its file."""
DRAINED = 10
"""A body over the limit is read up to this multiple of it, as browsers show the answer only after sending all."""


async def read_upload(request: Request, name: str, most_bytes: int) -> tuple[bytes, dict[str, str]]:
    """Read the file in the field `name` of a form, and the other fields.

    Raises RequestError without a file, or if it has more than `most_bytes`.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise RequestError(Problem.NOT_FORM)
    parser = _InMemory(request.headers, _at_most(request, most_bytes), max_files=1, max_fields=8, max_part_size=1_000)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise RequestError(Problem.UNREADABLE_FORM, error.message) from error
    file = form.get(name)
    data = await file.read() if isinstance(file, UploadFile) else b""
    if not data:
        raise RequestError(Problem.NOTHING_SENT)
    return data, {field: value for field, value in form.items() if isinstance(value, str)}


class _InMemory(MultiPartParser):
    """A parser that never writes a file to disk, as the size of the body is limited."""

    spool_max_size = 1 << 30


async def _at_most(request: Request, most_bytes: int) -> AsyncGenerator[bytes, None]:
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes <= most_bytes + _OTHER_BYTES:
            yield chunk
        elif num_bytes > DRAINED * most_bytes:
            break
    if num_bytes > most_bytes + _OTHER_BYTES:
        raise RequestError(Problem.LARGE_PICTURE, most_bytes // 1_000_000)
