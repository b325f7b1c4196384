"""Purge: rows of some images leave a store with all of its history, for takedowns; a proof ends it.

The newest snapshot is committed again from files without the rows. Then every snapshot whose files have them goes, and
the files themselves, whether a snapshot names them or not. Every step can be cut off anywhere: the next run continues.
No file is changed, so a reader finds what it opened, or misses a file, and never reads another row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featurestore import log, quarantine
from featurestore.commit import Commit
from featurestore.errors import CommitConflictError, CorruptFileError, PinError
from featurestore.format.datafile import DELETED, KEY, URI, numpy_column, open_entry, schema_of
from featurestore.format.shard_writer import check_digest, write_shard_file
from featurestore.published.channels import ChannelMove, read_channels
from featurestore.quarantine import QuarantineRow
from featurestore.spec import FileEntry, Manifest
from featurestore.staging import STAGING
from featurestore.storage.local import TEMPORARY
from featurestore.storage.threads import Progress
from featurestore.store import FeatureStore
from featurestore.upkeep import DATA
from featurestore.upkeep.damage import DAMAGED
from featurestore.upkeep.expiry import move_aside
from featurestore.upkeep.pins import Pin, read_pins, unpin
from featurestore.upkeep.promotion.moving import move_channel
from featurestore.upkeep.takedown.absence import AbsenceReport, Images, Trace, find_traces

PURGE = "purge"
_ATTEMPTS = 5
_HOUR_S = 3_600.0


@dataclass
class PurgeReport:
    """What was done, or in a dry run what would be."""

    num_rows: int = 0
    """In all files, tombstones and earlier versions of a row among them."""
    without_rows: list[str] = field(default_factory=list)
    """Keys or uris that no file had a row of: misspelt, or purged before."""
    version: int | None = None
    """The new snapshot; None where the newest one had no such row."""
    expired: tuple[int, ...] = ()
    moved: list[str] = field(default_factory=list)
    """Channels that follow to the new snapshot."""
    unpinned: list[str] = field(default_factory=list)
    num_quarantined: int = 0
    runs: list[str] = field(default_factory=list)
    """Of which the staged parts were removed."""
    num_files: int = 0
    """Data files that were deleted, and others with a trace."""
    young: list[str] = field(default_factory=list)
    """What a writer may be at work on."""
    proof: AbsenceReport | None = None
    """Of all files that are left; None in a dry run."""

    @property
    def is_complete(self) -> bool:
        """Whether it is proved that no row is left."""
        return self.proof is not None and self.proof.is_absent


def purge(
    store: FeatureStore,
    images: Images,
    *,
    move_channels: bool = False,
    drop_pins: bool = False,
    writer_hours: float = 1.0,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PurgeReport:
    """Remove all rows of the images from all snapshots, the quarantine and what was staged, and prove it.

    Snapshots whose files have such rows go, and with them the history that they are. A channel that points to the
    newest snapshot follows to the new one; one that points to an older snapshot that goes is refused, unless
    `move_channels` lets it follow too; a pin of such a snapshot is refused unless `drop_pins`. Files of no snapshot
    that are younger than `writer_hours` may be a writer's, and stay: then the proof fails, and it has to run again.
    Let no other writer be at work: what one adds meanwhile is found by the proof, and one that began from a file that
    goes fails.

    Reads key and uri of all files twice; rewrites the files of the newest snapshot that have the rows. Raises PinError
    for pins and channels before anything is changed; CommitConflictError where others commit again and again;
    CorruptFileError where the newest snapshot has a damaged file, which `repair` mends.
    """
    return _Purge(store, images, move_channels, drop_pins, writer_hours * _HOUR_S, dry_run).run(progress)


class _Purge:
    """One run of a purge."""

    def __init__(
        self,
        store: FeatureStore,
        images: Images,
        move_channels: bool,
        drop_pins: bool,
        writer_s: float,
        dry_run: bool,
    ) -> None:
        self.store, self.storage, self.images = store, store.storage, images
        self.move_channels, self.drop_pins, self.writer_s = move_channels, drop_pins, writer_s
        self.dry_run = dry_run
        self.report = PurgeReport()

    def run(self, progress: Progress | None) -> PurgeReport:
        found: set[int | str] = set()
        for _ in range(_ATTEMPTS):
            before = find_traces(self.storage, self.images, progress)
            traces = before.traces
            found |= before.found
            self.report.without_rows = self.images.without_rows(found)
            self.report.num_rows = max(self.report.num_rows, sum(trace.rows for trace in traces))
            try:
                if self._remove(traces):
                    break
            except CommitConflictError:
                continue  # another writer was first: its snapshot is looked at from the beginning
        else:
            raise CommitConflictError(
                f"other writers committed to {self.store.url} {_ATTEMPTS} times meanwhile: stop them, and run it again"
            )
        if not self.dry_run:
            self.report.proof = find_traces(self.storage, self.images, progress)
        return self.report

    def _remove(self, traces: Sequence[Trace]) -> bool:
        """Remove what has traces; return whether nothing came in between."""
        bad = {trace.path for trace in traces if trace.path.startswith(f"{DATA}/")}
        manifests = [log.read(self.storage, version) for version in log.versions(self.storage)]
        affected = {each.version: each for each in manifests if _paths(each) & bad}
        newest = manifests[-1] if manifests else log.EMPTY
        self._check_readable(newest, traces)
        quarantined = self._quarantined()
        pins, moves = self._kept_by_name(affected, newest)
        self.report.expired = tuple(sorted({*self.report.expired, *affected}))
        if not self.dry_run:
            if newest.version in affected:
                newest = self._commit_again(newest, bad)
                self.report.version = newest.version
            self._follow(pins, moves, newest)
            move_aside(self.store, sorted(affected))
            if any(_paths(log.read(self.storage, version)) & bad for version in log.versions(self.storage)):
                return False  # somebody restored or committed such a file in the meantime
        self.report.num_quarantined += len(quarantined)
        if not self.dry_run:
            quarantine.resolve(self.storage, quarantined)
        # A purge that was cut off may have taken them out of the log already.
        expired = [log.find(self.storage, version) for version in log.versions(self.storage, log.EXPIRED)]
        gone = [*affected.values(), *(each for each in expired if each is not None)]
        self._delete(traces, {path for each in gone for path in _paths(each)})
        return True

    def _check_readable(self, newest: Manifest, traces: Sequence[Trace]) -> None:
        unread = {trace.path: trace.text for trace in traces if trace.kind == "unread"}
        for path in _paths(newest) & unread.keys():
            raise CorruptFileError(f"{unread[path]}: python -m featurestore repair {self.store.url}, and purge again")

    def _kept_by_name(self, affected: dict[int, Manifest], newest: Manifest) -> tuple[list[Pin], list[ChannelMove]]:
        """Find pins and channels of snapshots that go. Raises PinError where they may not follow."""
        pins = [pin for pin in read_pins(self.storage) if pin.version in affected]
        moves = [move for move in read_channels(self.storage) if move.version in affected]
        # After a kill: the snapshot before a purge's is the same but for the rows.
        same = {newest.commit_id} | ({newest.parent} if newest.operation == PURGE else set())
        stray = [move for move in moves if move.commit_id not in same]
        problems = []
        if pins and not self.drop_pins:
            names = ", ".join(f"{pin.name} (snapshot {pin.version})" for pin in pins)
            problems.append(f"pins keep snapshots that have such rows: {names}; --unpin removes them")
        if stray and not self.move_channels:
            names = ", ".join(f"{move.channel} (snapshot {move.version})" for move in stray)
            problems.append(
                f"channels point to snapshots that have such rows: {names}; --move-channels lets them follow to the"
                " snapshot that the purge makes of the newest one"
            )
        if problems:
            raise PinError(f"nothing was purged from {self.store.url}: {'; and '.join(problems)}")
        return pins, moves

    def _commit_again(self, newest: Manifest, bad: set[str]) -> Manifest:
        """Commit the newest snapshot from files without the rows."""
        replaces = {shard: files for shard, files in newest.shards.items() if any(file.path in bad for file in files)}
        entries: dict[int, list[FileEntry]] = {}
        for shard, files in replaces.items():
            kept = [file if file.path not in bad else self._without(shard, file) for file in files]
            if left := [file for file in kept if file is not None]:
                entries[shard] = left
        commit = Commit(
            storage=self.storage,
            info=self.store.info,
            operation=PURGE,
            entries=entries,
            replaces=replaces,
            only_after=newest.version,
            num_quarantined=newest.num_quarantined,
        )
        commit.check_files()
        return commit.publish().manifest

    def _without(self, shard: int, entry: FileEntry) -> FileEntry | None:
        """Write a file anew without the rows; None where none is left. Raises CorruptFileError."""
        info = self.store.info
        check_digest(self.storage, entry.path, entry.bytes, "xxh3_128", entry.xxh3_128)
        with open_entry(self.storage, info, entry) as file:
            names = file.read([KEY, URI, DELETED])
            if self._are_in(names).all():
                return None
        with open_entry(self.storage, info, entry, streaming=True) as file:

            def blocks() -> Iterator[pa.Table]:
                for block in file.blocks(schema_of(info).names):
                    yield block.filter(pa.array(~self._are_in(block)))

            return write_shard_file(self.storage, info, shard, blocks(), entry.kind, entry.based_on)

    def _are_in(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        return self.images.are_in(numpy_column(table, KEY), table[URI])

    def _follow(self, pins: Sequence[Pin], moves: Sequence[ChannelMove], newest: Manifest) -> None:
        for move in moves:
            move_channel(self.store, move.channel, newest.version, f"{PURGE}: snapshot {move.version} has gone")
            self.report.moved.append(move.channel)
        for pin in pins:
            unpin(self.store, pin.name)
            self.report.unpinned.append(pin.name)

    def _quarantined(self) -> list[QuarantineRow]:
        """Read all of their rows in quarantine, older ones of a key too. Raises CorruptFileError."""
        names = self.storage.list(quarantine.QUARANTINE)
        rows = [row for name in names for row in quarantine.read_file(self.storage, name)]
        keys = set(self.images.keys_N.tolist())
        theirs = [row for row in rows if row.key in keys or row.uri in self.images.uris]
        return sorted(theirs, key=lambda row: row.time_s)

    def _delete(self, traces: Sequence[Trace], named: set[str]) -> None:
        """Delete the files with traces, and the statistics of data files; what no snapshot named only if it is old."""
        now_s = self.storage.now()
        runs: dict[str, float] = {}
        doomed: list[str] = []
        statistics = {entry.path for entry in self.storage.entries(DATA)}
        for trace in traces:
            folder, _, name = trace.path.partition("/")
            try:
                age_s = now_s - self.storage.entry(trace.path).mtime_s
            except FileNotFoundError:
                continue
            if folder == STAGING and "/" in name:
                run = name.partition("/")[0]
                runs[run] = min(age_s, runs.get(run, age_s))
            elif folder == DATA and trace.path in named:
                doomed.append(trace.path)
            elif folder in (DATA, DAMAGED) or trace.path.rpartition("/")[2].startswith(TEMPORARY):
                (doomed if age_s >= self.writer_s else self.report.young).append(trace.path)
        for run, age_s in runs.items():
            if age_s >= self.writer_s:
                self.report.runs.append(run)
                if not self.dry_run:
                    self.storage.delete(f"{STAGING}/{run}")
            else:
                self.report.young.append(f"{STAGING}/{run}")
        next_to_them = [path.removesuffix(".parquet") + ".stats.npy" for path in doomed]
        self.report.num_files += len(doomed)
        if not self.dry_run:
            self.storage.delete_files([*(path for path in next_to_them if path in statistics), *doomed])


def _paths(manifest: Manifest) -> set[str]:
    return {entry.path for entry in manifest.entries}
