"""Pictures below one folder or address, as small JPEGs; files outside of it are never read."""

import io
import os
import posixpath
import time
from pathlib import Path
from threading import BoundedSemaphore
from typing import NamedTuple

from PIL import Image, ImageDraw

from explorer.data.cache import LruCache
from explorer.problems import Problem
from pipeline.errors import BadImageError
from pipeline.images.decode import decode
from pipeline.images.source import read_image

SIZES = (96, 160, 320, 800)
"""Pixels of the longer side; few sizes, so that few pictures are computed."""
CACHE_BYTES = 64_000_000
MAX_FILE_BYTES = 100_000_000
AT_ONCE = max(2, min(4, len(os.sched_getaffinity(0))))
"""Pictures decoded at the same time: one may need 200 MB for a moment, and more are not faster."""
_FAR_HOLDS_S = 60
"""Seconds for which a picture of an object store is cached, as replacements are not noticed."""


class Picture(NamedTuple):
    """A JPEG; if it is a placeholder, `problem` has the reason."""

    jpeg: bytes
    problem: str


class Pictures:
    """Small pictures by uri, with an LRU cache of CACHE_BYTES in memory. Thread-safe."""

    def __init__(self, place: str | None) -> None:
        """`place`: folder or address of the images, or None."""
        self.place = place
        self._decoders = BoundedSemaphore(AT_ONCE)
        self._kept: LruCache[Picture] = LruCache(CACHE_BYTES, lambda picture: len(picture.jpeg))

    def get(self, uri: str, size: int) -> Picture:
        """Return the picture, its longer side at most `size` pixels rounded up to one of SIZES.

        For a picture that is missing, broken or outside of the place, returns a grey one with the reason.
        """
        size = next((each for each in SIZES if each >= size), SIZES[-1])
        try:
            location, state = self.locate(uri)
        except BadImageError as error:
            return placeholder(str(error), size)
        return self._kept.get((uri, size, state), lambda: self._made(location, size))

    def _made(self, location: str, size: int) -> Picture:
        with self._decoders:
            try:
                data = read_image(location, MAX_FILE_BYTES + 1)
            except BadImageError:
                return placeholder(Problem.NO_PICTURE, size)
            return shrunk(data, size) if len(data) <= MAX_FILE_BYTES else placeholder(Problem.BROKEN, size)

    def locate(self, uri: str) -> tuple[str, object]:
        """Find a picture below the place: its location, and a state that changes when it is replaced.

        Raises BadImageError if there is no place, or if the picture is outside of it, also by a link.
        """
        if self.place is None or not uri or "\0" in uri:
            raise BadImageError(Problem.NO_PICTURE)
        place = self.place.removeprefix("file://")
        if "://" in place:
            below = uri.removeprefix(f"{place.rstrip('/')}/")  # a table of images may have absolute addresses
            if below.startswith(("/", "../")) or posixpath.normpath(below) != below or below == "..":
                raise BadImageError(Problem.REFUSED)
            return f"{place.rstrip('/')}/{below}", int(time.monotonic() / _FAR_HOLDS_S)
        root, uri = Path(place).resolve(), uri.removeprefix("file://")
        try:
            file = (root / uri).resolve(strict=True)
            found = file.stat()
        except (OSError, RuntimeError, ValueError):
            raise BadImageError(Problem.NO_PICTURE) from None
        if not file.is_relative_to(root):
            raise BadImageError(Problem.REFUSED)
        if not file.is_file() or found.st_size > MAX_FILE_BYTES:
            raise BadImageError(Problem.BROKEN)
        return str(file), (found.st_ino, found.st_size, found.st_mtime_ns)


def shrunk(data: bytes, size: int) -> Picture:
    """Make a small JPEG from the bytes of an image file."""
    try:
        image, _ = decode(data, scaled_side=size)
    except BadImageError:
        return placeholder(Problem.BROKEN, size)
    image.thumbnail((size, size), reducing_gap=2.0)
    return Picture(_jpeg(image), "")


def placeholder(problem: str, size: int) -> Picture:
    """Draw a grey square with an error message."""
    image = Image.new("RGB", (size, size), "#d8d8d8")
    ImageDraw.Draw(image).text((size / 2, size / 2), problem, fill="#404040", anchor="mm")
    return Picture(_jpeg(image), problem)


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
