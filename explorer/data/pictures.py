"""Pictures below one folder or address, as small JPEGs; nothing outside of it is ever read."""

import functools
import io
import posixpath
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from PIL import Image, ImageDraw

from pipeline.errors import BadImageError
from pipeline.images.decode import decode
from pipeline.images.source import read_image

SIZES = (96, 160, 320, 800)
"""Pixels of the longer side: few, so that few are computed."""
CACHE_BYTES = 64_000_000
MAX_FILE_BYTES = 100_000_000
_MISSING, _BROKEN, _REFUSED = "no picture", "broken", "refused"


class Picture(NamedTuple):
    """A JPEG, and why it is a placeholder; `problem` is empty where it is the picture."""

    jpeg: bytes
    problem: str


class Pictures:
    """Small pictures by uri, the newest used ones kept in memory, at most CACHE_BYTES of them. For several threads."""

    def __init__(self, place: str | None) -> None:
        """`place`: folder or address of the images, None where there are none."""
        self.place = place
        self._lock = Lock()
        self._kept: OrderedDict[tuple[str, int, object], Picture] = OrderedDict()
        self._kept_bytes = 0

    def get(self, uri: str, size: int) -> Picture:
        """Give the picture, its longer side at most `size` pixels rounded up to one of SIZES.

        A picture that is missing, broken or outside of the place is a grey one that says so: pages stay whole.
        """
        size = next((each for each in SIZES if each >= size), SIZES[-1])
        try:
            location, state = self.locate(uri)
        except BadImageError as error:
            return placeholder(str(error), size)
        name = (uri, size, state)
        with self._lock:
            if (kept := self._kept.get(name)) is not None:
                self._kept.move_to_end(name)
                return kept
        made = _made(location, size)
        if state is not None:
            self._keep(name, made)
        return made

    def locate(self, uri: str) -> tuple[str, object]:
        """Find a picture below the place: its location, and what changes when it is replaced (None: unknown).

        Raises BadImageError: it has none, or it would lie outside of the place, also by a link.
        """
        if self.place is None or not uri or "\0" in uri:
            raise BadImageError(_MISSING)
        if "://" in self.place:
            if uri.startswith("/") or posixpath.normpath(uri) != uri or uri.startswith("..") or "://" in uri:
                raise BadImageError(_REFUSED)
            return f"{self.place.rstrip('/')}/{uri}", None
        root = Path(self.place).resolve()
        try:
            file = (root / uri).resolve(strict=True)
            found = file.stat()
        except (OSError, RuntimeError, ValueError):
            raise BadImageError(_MISSING) from None
        if not file.is_relative_to(root):
            raise BadImageError(_REFUSED)
        if not file.is_file() or found.st_size > MAX_FILE_BYTES:
            raise BadImageError(_BROKEN)
        return str(file), (found.st_ino, found.st_size, found.st_mtime_ns)

    def _keep(self, name: tuple[str, int, object], made: Picture) -> None:
        with self._lock:
            before = self._kept.pop(name, None)
            self._kept[name] = made
            self._kept_bytes += len(made.jpeg) - (len(before.jpeg) if before else 0)
            while self._kept_bytes > CACHE_BYTES:
                _, oldest = self._kept.popitem(last=False)
                self._kept_bytes -= len(oldest.jpeg)


def _made(location: str, size: int) -> Picture:
    try:
        data = read_image(location)
    except BadImageError:
        return placeholder(_MISSING, size)
    return shrunk(data, size)


def shrunk(data: bytes, size: int) -> Picture:
    """Make a picture out of the bytes of an image file."""
    try:
        image, _ = decode(data, scaled_side=size)
    except BadImageError:
        return placeholder(_BROKEN, size)
    image.thumbnail((size, size), reducing_gap=2.0)
    return Picture(_jpeg(image), "")


@functools.lru_cache(maxsize=64)
def placeholder(problem: str, size: int) -> Picture:
    """Draw a grey square that says what is wrong."""
    image = Image.new("RGB", (size, size), "#d8d8d8")
    ImageDraw.Draw(image).text((size / 2, size / 2), problem, fill="#404040", anchor="mm")
    return Picture(_jpeg(image), problem)


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
