"""Export of the pages to a folder of files, following all links up to a limit; it opens without a server."""

import asyncio
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import httpx2

from explorer.errors import ExplorerError
from explorer.html.site import LEFT_OUT, Site, file_of
from explorer.places import Places
from explorer.problems import Problem
from explorer.server import application

_HOST = "http://localhost"


class ExportedPages(NamedTuple):
    """The results of an export: files, bytes, error pages, and addresses left out."""

    num_files: int
    num_bytes: int
    errors: list[str]
    """Address and status of each error page."""
    num_left_out: int
    """At least this many: those that exported pages link to."""


def export(
    places: Places,
    out: Path,
    most_files: int,
    tell: Callable[[int, int], None],
    doing: Callable[[str], None] = lambda doing: None,
) -> ExportedPages:
    """Write the pages of `places` into the folder `out`, completely or not at all; `tell` gets done and known files.

    `doing` gets what a slow page waits for. Replaces an earlier export in `out`. Raises ExplorerError if `out` holds
    something else or cannot be written.
    """
    if out.exists() and not (out / LEFT_OUT).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ExplorerError(Problem.NOT_EXPORT, out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
            pages, site = Path(folder) / "pages", Site(places, frozen=True, most_files=most_files, doing=doing)
            exported = asyncio.run(_export(site, pages, tell))
            shutil.rmtree(out, ignore_errors=True)
            pages.rename(out)
    except OSError as failure:
        raise ExplorerError(Problem.CANNOT_WRITE, out, failure.strerror) from failure
    return exported


async def _export(site: Site, folder: Path, tell: Callable[[int, int], None]) -> ExportedPages:
    app = application(site)
    done, num_bytes, errors = 0, 0, []
    transport = httpx2.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx2.AsyncClient(transport=transport, base_url=_HOST) as client:
        while done < len(site.linked):
            address = site.linked[done]
            answer = await client.get(address)
            if answer.status_code != httpx2.codes.OK:
                errors.append(f"{address}: {answer.status_code}")
            num_bytes += _write(folder / file_of(address), answer.content)
            done += 1
            tell(done, len(site.linked))
        num_bytes += _write(folder / LEFT_OUT, (await client.get(f"/{LEFT_OUT}")).content)
    return ExportedPages(done + 1, num_bytes, errors, len(site.left_out))


def _write(file: Path, content: bytes) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return len(content)
