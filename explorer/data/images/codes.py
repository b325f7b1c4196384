"""Semantic IDs of images, where samples have them: which images share the longest prefix of codes with one.

Letters of shapes: M images with codes, D width of what the codes are of.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from explorer.data.images.neighbours import Neighbours, with_names
from explorer.data.kept import Kept
from featurestore.errors import StorageError
from featurestore.parsing import parse_json
from featurestore.published.versions import open_published
from featurestore.snapshot import Snapshot

if TYPE_CHECKING:
    from pipeline.semantic.codes import Codebook, CodeIndex

_MARK = "summary.json"


@dataclass(frozen=True)
class SemanticIds:
    """The codes of all images, at an address. 16 bytes an image in memory."""

    address: str
    index: "CodeIndex"
    source: dict[str, Any]
    """What the codes are of, as the job that made them says."""

    @property
    def origin(self) -> str:
        """Say in words what the codes are of."""
        of = self.source.get("of", {})
        if "network" in of:
            return f"visual vectors of {of.get('run')}, {of.get('checkpoint')}"
        return f"features of snapshot {self.source['snapshot']}" if "snapshot" in self.source else "vectors of a file"

    def codes_of(self, key: int) -> list[int] | None:
        """List the codes of an image; None where it has none."""
        full = int(self.index.lookup(np.array([key], np.int64))[0])
        return None if full < 0 else self.codes(full)

    def codes(self, full: int) -> list[int]:
        """Take a full code, which is one number, apart."""
        full_N = np.array([full], np.int64)
        return [int(self.index.code(full_N, level)[0]) for level in range(self.index.num_levels)]


class CodeShelf:
    """Semantic IDs by address; the last two are kept. For several threads."""

    def __init__(self) -> None:
        self._read: Kept[SemanticIds] = Kept(2)

    def open(self, address: str) -> SemanticIds | None:
        """Read the semantic IDs next to samples; None where there are none. Raises SampleError, StorageError."""
        from pipeline.semantic.codes import FOLDER, read_codes

        storage = open_published(address)
        try:
            mark = storage.read_bytes(_MARK)
            summary: dict[str, Any] = parse_json(mark)
            num_codes = int(summary["codebook"]["codes"])
        except (FileNotFoundError, StorageError, ValueError, KeyError, TypeError):
            return None
        if not storage.list(FOLDER):
            return None
        return self._read.get(
            (address, mark), lambda: SemanticIds(address, read_codes(storage, num_codes), summary.get("source", {}))
        )


def nearest_codes(
    snapshot: Snapshot, ids: SemanticIds, codes: list[int], most: int, without: int | None = None
) -> Neighbours:
    """Find the images of the snapshot that share the longest prefix of codes; of equal ones the smaller key first.

    Those that share no code are left out. Looks at all codes once for each level.
    """
    index = ids.index
    keys: list[int] = []
    nearness: list[float] = []
    taken_M = np.zeros(len(index.keys_M), np.bool_)
    if without is not None:
        taken_M |= index.keys_M == without
    for length in range(index.num_levels, 0, -1):
        wanted = 0
        for code in codes[:length]:
            wanted = wanted * index.num_codes + code
        same_M = (index.prefix(index.prefix_M, length) == wanted) & ~taken_M
        taken_M |= same_M
        found = index.keys_M[same_M][: most - len(keys)].tolist()
        keys += found
        nearness += [float(length)] * len(found)
    count = len(index.keys_M)
    images = tuple(with_names(snapshot, keys, nearness))
    return Neighbours(images=images, num_searched=count, num_rows=count, seconds=0)


def encode(ids: SemanticIds, vector_D: npt.NDArray[np.float32]) -> list[int] | None:
    """Compute the codes of a vector of the kind that the codebook is of; None where it has another width.

    Raises SampleError.
    """
    codebook = _codebook(ids.address)
    if codebook.dim != len(vector_D):
        return None
    codes_NL, _, _ = codebook.encode(vector_D[None].astype(np.float32))
    return [int(code) for code in codes_NL[0]]


def _codebook(address: str) -> "Codebook":
    from pipeline.samples.publish import CODEBOOK_FILE
    from pipeline.semantic.codes import Codebook

    place = open_published(address)
    return Codebook.from_bytes(place.read_bytes(CODEBOOK_FILE), place.full(CODEBOOK_FILE))
