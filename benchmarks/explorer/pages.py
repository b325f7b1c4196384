"""Pages of a large store: the first time after the server has begun, and again."""

import re
import statistics
import time
from html import unescape

from benchmarks.explorer.shop import Shop
from benchmarks.process import RunFailedError
from benchmarks.report import Section
from benchmarks.serve.client import Connection
from benchmarks.serve.servers import started

STYLE = "/static/style.css"
"""Answered without a look at the store."""
_ROUNDS = 5
_NAV = re.compile(r"<nav.*?</nav>", re.DOTALL)
_LINK = re.compile(r'href="([^"]+)"')


def measure(shop: Shop) -> Section:
    """Time the first page, each page of the navigation, and the memory before and behind them."""
    log = shop.store.parent / "server.log"
    with started(shop.options, log, STYLE) as server, Connection(server.port) as connection:
        before = server.memory.private_mb
        seconds, text = _timed(connection, "/")
        grid = {"first page": _row(connection, "/", seconds)}
        for path in dict.fromkeys(map(unescape, _LINK.findall("".join(_NAV.findall(text))))):
            seconds, _ = _timed(connection, path)
            grid[path.strip("/")] = _row(connection, path, seconds)
        after = server.memory.private_mb
    figures = {
        "first_page_s": grid["first page"]["first_s"],
        "slowest_page_s": max(row["first_s"] for row in grid.values()),
        "rss_before_pages_mb": before,
        "rss_after_pages_mb": after,
    }
    return Section("pages", figures, grid, prefix="page_")


def _row(connection: Connection, path: str, first_s: float) -> dict[str, float]:
    again = [_timed(connection, path)[0] for _ in range(_ROUNDS)]
    return {"first_s": first_s, "again_s": statistics.median(again)}


def _timed(connection: Connection, path: str) -> tuple[float, str]:
    """Ask for a page; return seconds and text. Raises RunFailedError where it is not there."""
    begin = time.perf_counter()
    status, answer = connection.get(path.encode())
    seconds = time.perf_counter() - begin
    if status != 200:
        raise RunFailedError(f"the explorer answered {status} at {path}: {answer[:500].decode(errors='replace')}")
    return seconds, answer.decode()
