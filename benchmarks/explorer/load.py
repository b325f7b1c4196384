"""Small pictures at a fixed rate, and whether the server's memory grows meanwhile."""

from urllib.parse import quote

import numpy as np

from benchmarks.explorer.pages import STYLE
from benchmarks.explorer.shop import Shop
from benchmarks.report import Section
from benchmarks.serve.client import Connection, as_many_as_it_can, at_rate
from benchmarks.serve.servers import started

SIZE = 160


def measure(shop: Shop, rate: int, seconds: int) -> Section:
    """Ask for each picture once, then for drawn ones at `rate` a second; a tenth of them are of no picture."""
    draw = np.random.default_rng(1)
    known = [f"/picture?size={SIZE}&uri={quote(name, safe='')}".encode() for name in shop.pictures]
    drawn = [known[number] for number in draw.integers(0, len(known), rate * seconds)]
    for place in range(0, len(drawn), 10):
        drawn[place] = f"/picture?size={SIZE}&uri=unknown-{place}.jpg".encode()
    with started(shop.options, shop.store.parent / "server.log", STYLE) as server:
        before = server.memory.private_mb
        first = as_many_as_it_can(server.port, known, len(known), send=Connection.get)
        warm = server.memory.private_mb
        load = at_rate(server.port, drawn, len(drawn), rate, send=Connection.get)
        end = server.memory.private_mb
        most = as_many_as_it_can(server.port, drawn, len(drawn), send=Connection.get)
    figures = {
        "pictures_rps": load.rps,
        "pictures_failed": first.failed + load.failed + most.failed,
        "pictures_p50_ms": load.ms(50),
        "pictures_p99_ms": load.ms(99),
        "pictures_new_rps": first.rps,
        "pictures_most_rps": most.rps,
        "rss_before_mb": before,
        "rss_warm_mb": warm,
        "rss_growth_mb": end - warm,
    }
    return Section("pictures under load", figures)
