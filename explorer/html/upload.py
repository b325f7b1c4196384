"""A file that somebody sends by a form: read into memory, never to the disk, and no larger than is allowed."""

from collections.abc import AsyncGenerator

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from explorer.errors import ExplorerError

_OTHER_BYTES = 100_000
"""Of a form besides its file."""
DRAINED = 10
"""Times the limit that is read of a body that is too large: a browser shows the answer when it has sent all."""


async def read_upload(request: Request, name: str, most_bytes: int) -> tuple[bytes, dict[str, str]]:
    """Read the file in the field `name` of a form, and the other fields.

    Raises ExplorerError without a file, or where it has more than `most_bytes`.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ExplorerError("a picture is sent by the form, as multipart/form-data")
    parser = _InMemory(request.headers, _at_most(request, most_bytes), max_files=1, max_fields=8, max_part_size=1_000)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise ExplorerError(f"the form cannot be read: {error.message}") from error
    file = form.get(name)
    data = await file.read() if isinstance(file, UploadFile) else b""
    if not data:
        raise ExplorerError("no picture was sent: choose a file first")
    return data, {field: value for field, value in form.items() if isinstance(value, str)}


class _InMemory(MultiPartParser):
    """A parser that puts no file onto the disk: the body is no larger than is allowed."""

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
        raise ExplorerError(f"the picture has more than {most_bytes // 1_000_000} MB; send a smaller one")
