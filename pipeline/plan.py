"""What an extraction has to do: which images are new, which have equal bytes, which make a part."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import xxhash

from featurestore.errors import KeyCollisionError
from featurestore.snapshot import Snapshot
from pipeline.source import ImageRef

MAX_GROUP_PARTS = 16  # copies of one image fill at most so many parts' worth of one part; beyond, it is computed again


@dataclass(frozen=True)
class Part:
    """Images that one task works on. The name changes with its images, so a staged part never stands for others."""

    name: str
    refs: tuple[ImageRef, ...]


def pending_images(images: Sequence[ImageRef], snapshot: Snapshot) -> list[ImageRef]:
    """Those that the store does not have yet, or whose file has changed since.

    Raises KeyCollisionError when the store has another image under a key.
    """
    table = snapshot.metadata_table().select(["key", "uri", "source_tag"])
    columns = (table.column(name).to_pylist() for name in ("key", "uri", "source_tag"))
    stored = {key: (uri, tag) for key, uri, tag in zip(*columns, strict=True)}
    pending = []
    for ref in images:
        uri, tag = stored.get(ref.key, (ref.uri, None))
        if uri != ref.uri:
            raise KeyCollisionError(
                f"key {ref.key} is {uri!r} in the store and {ref.uri!r} among the images: rename one,"
                " or use another store"
            )
        if not ref.source_tag or tag != ref.source_tag:
            pending.append(ref)
    return pending


def run_id_of(images: Iterable[ImageRef], spec_digest: str, dtype: str, part_size: int) -> str:
    """The same for the same inputs, so that a killed run finds what it staged: xxh3-128 of all of them."""
    digest = xxhash.xxh3_128(json.dumps([spec_digest, dtype, part_size]).encode())
    for ref in images:
        digest.update(json.dumps([ref.key, ref.uri, ref.location, ref.source_tag]).encode())
    return digest.hexdigest()


def equal_candidates(refs: Iterable[ImageRef]) -> list[ImageRef]:
    """Those whose bytes may equal another's: same size, or size unknown. Only these must be read to find out."""
    refs = list(refs)
    sizes = Counter(ref.size_bytes for ref in refs)
    return [ref for ref in refs if sizes[ref.size_bytes] > 1 or ref.size_bytes < 0]


def make_parts(refs: Sequence[ImageRef], digest_of: Callable[[ImageRef], bytes], part_size: int) -> list[Part]:
    """Parts of about `part_size` images in the order of `refs`; images of equal digest stand in one part.

    `digest_of` gives empty bytes for an image that has no equal.
    """
    groups: dict[bytes | int, list[ImageRef]] = {}
    for ref in refs:
        groups.setdefault(digest_of(ref) or ref.key, []).append(ref)
    parts: list[Part] = []
    current: list[ImageRef] = []
    for group in groups.values():
        for start in range(0, len(group), MAX_GROUP_PARTS * part_size):
            current += group[start : start + MAX_GROUP_PARTS * part_size]
            if len(current) >= part_size:
                parts.append(_part(len(parts), current))
                current = []
    if current:
        parts.append(_part(len(parts), current))
    return parts


def _part(number: int, refs: Sequence[ImageRef]) -> Part:
    digest = xxhash.xxh3_64(json.dumps([(ref.key, ref.source_tag) for ref in refs]).encode())
    return Part(f"{number:06d}-{digest.hexdigest()}", tuple(refs))
