"""Addresses of pages, and the names of the files that stand for them in an exported folder."""

import posixpath
import re
from collections.abc import Mapping, Sequence
from urllib.parse import quote, urlencode

import xxhash

Param = str | int | float | bool | None

PICTURE, STATIC = "/picture", "/static/"
LEFT_OUT = "left-out.html"
"""Page of an exported folder in the place of those that were not exported."""
_ODD = re.compile(r"[^A-Za-z0-9]+")


def address(path: str, params: Mapping[str, Param | Sequence[str]]) -> str:
    """Write the address of a page: the path quoted, the parameters in the order of their names, None left out.

    A parameter with several values is written once for each.
    """
    given = {
        name: str(value) if isinstance(value, str | int | float) else list(value)
        for name, value in sorted(params.items())
        if value is not None
    }
    return quote(path) + (f"?{urlencode(given, doseq=True)}" if given else "")


def file_of(address: str) -> str:
    """Name the file of an address in an exported folder: readable, unique, and plain ASCII whatever it names."""
    if address == "/":
        return "index.html"
    if address.startswith(STATIC):
        return address[1:]
    name = f"{_ODD.sub('-', address)[:48].strip('-')}-{xxhash.xxh3_64_hexdigest(address.encode())}"
    return f"pictures/{name}.jpg" if address.startswith(PICTURE) else f"pages/{name}.html"


def relative(target: str, page: str) -> str:
    """Write the way from one file of an exported folder to another."""
    return posixpath.relpath(target, posixpath.dirname(page) or ".")
