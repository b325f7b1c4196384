"""Images that the store could not take: the reason and time of each, and what its file looks like now."""

from dataclasses import dataclass

from explorer.data.pictures import Pictures
from featurestore.staging import QuarantineRow
from featurestore.storage.threads import in_threads

_THREADS = 8


@dataclass(frozen=True)
class BrokenImage:
    """One image in quarantine, and its file as it is now; without the latter where it cannot be read."""

    key: int
    uri: str
    reason: str
    time_s: float
    size_bytes: int | None
    first_bytes: bytes


def look_at(rows: list[QuarantineRow], pictures: Pictures) -> list[BrokenImage]:
    """Look at the files of images in quarantine. Reads the first bytes of each."""

    def broken(row: QuarantineRow) -> BrokenImage:
        seen = pictures.look(row.uri)
        return BrokenImage(row.key, row.uri, row.reason, row.time_s, seen.size_bytes, seen.first_bytes)

    return list(in_threads(broken, rows, _THREADS)) if rows else []
