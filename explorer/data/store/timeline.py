"""The snapshots of a store on a line: what each commit did, by the manifests alone; no row is read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from explorer.data.kept import Kept
from featurestore import log
from featurestore.errors import CorruptFileError
from featurestore.published.channels import read_channels
from featurestore.spec import Manifest
from featurestore.storage.threads import in_threads
from featurestore.store import FeatureStore
from featurestore.upkeep.history import read_pins

_THREADS = 4
_MANY_FILES = 6_000
"""Files in manifests that are read before a page shows: some hundredths of a second."""


@dataclass(frozen=True, kw_only=True)
class SnapshotLine:
    """One kept snapshot. Where its manifest is damaged, all but version, pins and channels is missing."""

    version: int
    pins: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    is_damaged: bool = False
    time_s: float | None = None
    operation: str = ""
    writer: str = ""
    num_files: int | None = None
    file_rows: int | None = None
    """Rows in its files: images, their older rows, and tombstones."""
    file_bytes: int | None = None
    rows_written: int | None = None
    """Live rows in files that the commit before had not; None where that has expired."""
    rows_deleted: int | None = None
    """Tombstones in those files."""
    num_quarantined: int = 0


class Timeline:
    """The lines of a store's snapshots; each manifest is read once. For several threads."""

    def __init__(self) -> None:
        self._lines: Kept[SnapshotLine] = Kept(10_000)

    def is_quick(self, store: FeatureStore, versions: Sequence[int], num_files: int) -> bool:
        """Tell whether `lines` of these versions, of about this number of files each, is there at once."""
        unknown = sum(self._lines.peek((store.info.store_id, version)) is None for version in versions)
        return unknown * num_files <= _MANY_FILES

    def lines(self, store: FeatureStore, versions: Sequence[int]) -> list[SnapshotLine]:
        """Describe snapshots, in the order given; those that expire meanwhile are left out. Raises CorruptFileError."""
        pins: dict[int | None, list[str]] = {}
        channels: dict[int | None, list[str]] = {}
        for pin in read_pins(store.storage):
            pins.setdefault(pin.version, []).append(pin.name)
        for move in read_channels(store.storage):
            channels.setdefault(move.version, []).append(move.channel)
        found = in_threads(lambda version: self._line(store, version), versions, _THREADS)
        return [
            replace(line, pins=tuple(pins.get(line.version, ())), channels=tuple(channels.get(line.version, ())))
            for line in found
            if line is not None
        ]

    def _line(self, store: FeatureStore, version: int) -> SnapshotLine | None:
        try:
            return self._lines.get((store.info.store_id, version), lambda: _read_line(store, version))
        except FileNotFoundError:
            return None
        except CorruptFileError:
            return SnapshotLine(version=version, is_damaged=True)


def _read_line(store: FeatureStore, version: int) -> SnapshotLine:
    manifest = log.read(store.storage, version)
    written = _written(manifest, _parent_of(store, manifest))
    return SnapshotLine(
        version=version,
        time_s=manifest.time_s,
        operation=manifest.operation,
        writer=manifest.writer,
        num_files=manifest.num_files,
        file_rows=manifest.file_rows,
        file_bytes=manifest.file_bytes,
        rows_written=None if written is None else written[0],
        rows_deleted=None if written is None else written[1],
        num_quarantined=manifest.num_quarantined,
    )


def _parent_of(store: FeatureStore, manifest: Manifest) -> Manifest | None:
    if manifest.version == 1:
        return log.EMPTY
    try:
        parent = log.find(store.storage, manifest.version - 1)
    except CorruptFileError:
        return None
    return parent if parent is not None and parent.commit_id == manifest.parent else None


def _written(manifest: Manifest, parent: Manifest | None) -> tuple[int, int] | None:
    """Count live rows and tombstones of the files that the commit brought."""
    if parent is None:
        return None
    known = {entry.path for entry in parent.entries}
    new = [entry for entry in manifest.entries if entry.path not in known]
    return sum(entry.num_live for entry in new), sum(entry.num_deleted for entry in new)
