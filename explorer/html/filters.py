"""Formatting of numbers, sizes, times and names on pages."""

import datetime
import math

from rich.filesize import decimal

from featurestore.console.output import figure
from featurestore.log import utc_text
from featurestore.text import count_text, printable

DASH = "–"


def number(value: float | int | None, digits: int | None = None) -> str:
    """Format a number: integers with commas, others with `digits` decimals or as in tables; a dash for None."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return DASH
    if digits is not None:
        return f"{value:,.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else figure(value)


def things(value: int | None, thing: str) -> str:
    """Format a number with its noun, e.g. `1 row` or `2,000 rows`; a dash for None."""
    return f"{DASH} {thing}s" if value is None else count_text(value, thing)


def signed(value: float | None, digits: int = 4) -> str:
    """Write a difference with its sign."""
    return DASH if value is None or not math.isfinite(value) else f"{value:+.{digits}f}"


def size(value: int | None) -> str:
    """Write a number of bytes, e.g. 3.1 MB."""
    return DASH if value is None else decimal(value)


def time(value: float | None) -> str:
    """Write a time in seconds since 1970 as UTC."""
    return DASH if value is None else utc_text(value)


def ago(value: float | None) -> str:
    """Format the age of a time roughly, e.g. `3 minutes ago`."""
    if value is None:
        return DASH
    seconds = datetime.datetime.now(datetime.UTC).timestamp() - value
    for name, length in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return "just now"


FILTERS = {
    "number": number,
    "things": things,
    "signed": signed,
    "size": size,
    "time": time,
    "ago": ago,
    "plain": printable,
}
