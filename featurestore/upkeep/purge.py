"""Takedowns: removal of rows from the whole history, and the proof that they are gone.

The newest snapshot is committed again from files without the rows. Then every snapshot whose files have them goes, and
the files themselves, whether a snapshot names them or not. Every step can be cut off anywhere: the next run continues.
No file is changed, so a reader finds what it opened, or misses a file, and never reads another row.
"""

import contextlib
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore import log, staging
from featurestore.errors import CommitConflictError, CorruptFileError, KeyFileError, PinError
from featurestore.format.datafile import DELETED, KEY, URI, numpy_column, open_entry, schema_of
from featurestore.format.shard import check_digest, write_shard_file
from featurestore.keys import BoolArray, Int64Array, key_of_uri, keys_of_uris
from featurestore.problems import Problem
from featurestore.published.versions import ChannelMove, read_channels
from featurestore.spec import FileEntry, Manifest
from featurestore.storage.local import TEMPORARY, read_text
from featurestore.storage.storage import Progress, Storage, in_threads
from featurestore.store import Commit, FeatureStore
from featurestore.text import count_text
from featurestore.upkeep import DAMAGED, DATA
from featurestore.upkeep.expiry import move_aside
from featurestore.upkeep.history import move_channel, read_pins

_THREADS = 4
_PARQUET = b"PAR1"
_BLOCK_ROWS = 65_536  # of keys and uris

PURGE = "purge"
_ATTEMPTS = 5
_HOUR_S = 3_600.0
_WHOLE_NUMBER = re.compile(r"\s*[+-]?[0-9]+\s*")
NamedBy = Literal["key", "uri"]


@dataclass(frozen=True)
class Images:
    """The images of a takedown: keys (N,), ascending, and uris; a row with one of either is theirs."""

    keys_N: Int64Array
    uris: frozenset[str]

    @classmethod
    def of_keys(cls, keys: Int64Array) -> "Images":
        """Name images by keys."""
        return cls(np.unique(keys), frozenset())

    @classmethod
    def of_uris(cls, uris: list[str]) -> "Images":
        """Name images by uris; each names the key that it has by itself, and any that it was stored under."""
        return cls(np.unique(keys_of_uris(uris)), frozenset(uris))

    @property
    def described(self) -> str:
        """Describe their number, and whether keys or uris name them."""
        return count_text(len(self.uris), "uri") if self.uris else count_text(len(self.keys_N), "key")

    def are_in(self, keys_N: Int64Array, uris: Any) -> BoolArray:
        """Return which rows are theirs, (N,); `uris` is an Arrow array, or None where there are none."""
        found_N = np.isin(keys_N, self.keys_N)
        if self.uris and uris is not None:
            found_N |= np.array([uri in self.uris for uri in uris.to_pylist()], np.bool_)
        return found_N

    def without_rows(self, found: Collection[int | str]) -> list[str]:
        """List those of which neither key nor uri was found, in ascending order."""
        if self.uris:
            return [uri for uri in sorted(self.uris) if uri not in found and key_of_uri(uri) not in found]
        return [str(key) for key in self.keys_N.tolist() if key not in found]


@dataclass(frozen=True)
class Trace:
    """A file that has rows of the images, or one that cannot be read and may have some."""

    path: str
    rows: int | None  # None where it cannot be read
    text: str  # for display, with the full address


@dataclass
class AbsenceReport:
    """Counts of the files read, and the traces found."""

    num_files: int = 0
    num_bytes: int = 0
    traces: list[Trace] = field(default_factory=list)
    found: set[int | str] = field(default_factory=set)
    """Keys and uris of the images' rows, each of a row that has it."""

    @property
    def is_absent(self) -> bool:
        """Whether every file could be read, and none has a trace."""
        return not self.traces


def find_traces(storage: Storage, images: Images, progress: Progress | None = None) -> AbsenceReport:
    """Read every data file below the store's address, also those that no snapshot names, and find rows of the images.

    Data files are those that end in .parquet or begin as Parquet does: their keys and uris are read, tombstones among
    them. Other files have no rows. Files that vanish meanwhile are left out. Cost: the key and uri columns of all data
    files. Raises StorageError.
    """
    entries, report = storage.entries(), AbsenceReport()
    looked = in_threads(lambda entry: _look(storage, entry.path, images), entries, _THREADS, progress)
    for entry, (trace, found) in zip(entries, looked, strict=True):
        report.num_files += 1
        report.num_bytes += entry.size_bytes
        report.found |= found
        if trace is not None:
            report.traces.append(trace)
    return report


def _look(storage: Storage, path: str, images: Images) -> tuple[Trace | None, set[int | str]]:
    """Find rows of the images in a file, and their keys and uris; none where it vanishes meanwhile."""
    found, num_rows = set[int | str](), 0
    try:
        with storage.open_input(path) as source:
            if source.read(len(_PARQUET)) != _PARQUET and not path.endswith(".parquet"):
                return None, found
            source.seek(0)
            file = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False)
            names = [name for name in (KEY, URI) if name in file.schema_arrow.names]
            if KEY not in names:
                raise KeyError(f"it has no column {KEY}, so it is not a file of a store")
            for batch in file.iter_batches(_BLOCK_ROWS, columns=names, use_threads=False):
                keys_K = np.asarray(batch[KEY].to_numpy(zero_copy_only=False), np.int64)
                uris = batch[URI] if URI in names else None
                theirs_K = images.are_in(keys_K, uris)
                num_rows += int(theirs_K.sum())
                found.update(keys_K[theirs_K].tolist())
                if uris is not None:
                    found.update(uri for uri in uris.filter(pa.array(theirs_K)).to_pylist() if uri is not None)
    except FileNotFoundError:
        return None, set()
    except (CorruptFileError, pa.ArrowException, OSError, KeyError) as error:
        text = f"{storage.full(path)} cannot be read, and may have their rows: {error}"
        return Trace(path, None, text), found
    text = f"{storage.full(path)} has {num_rows:,} of their rows"
    return Trace(path, num_rows, text) if num_rows else None, found


@dataclass
class PurgeReport:
    """Results of a purge, or of its dry run."""

    num_rows: int = 0
    """Rows in all files, with tombstones and earlier versions of a row."""
    without_rows: list[str] = field(default_factory=list)
    """Keys or uris that no file had a row of: misspelt, or purged before."""
    version: int | None = None
    """The new snapshot; None if the newest one had no such row."""
    expired: tuple[int, ...] = ()
    moved: list[str] = field(default_factory=list)
    """Channels that follow to the new snapshot."""
    num_quarantined: int = 0
    runs: list[str] = field(default_factory=list)
    """Runs whose staged parts were removed."""
    num_files: int = 0
    """Data files that were deleted."""
    young: list[str] = field(default_factory=list)
    """Files that a writer may be writing."""
    proof: AbsenceReport | None = None
    """Check of all files that are left; None in a dry run."""

    @property
    def is_complete(self) -> bool:
        """Whether it is proved that no row is left."""
        return self.proof is not None and self.proof.is_absent


def purge(
    store: FeatureStore,
    images: Images,
    *,
    writer_hours: float = 1.0,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PurgeReport:
    """Remove all rows of the images from all snapshots, the quarantine and staged parts, and prove it.

    Snapshots whose files have such rows go, and with them the history that they are. A channel that points to the
    newest snapshot follows to the new one; one that points to an older snapshot that goes is refused, and so is a pin
    of one. Files of no snapshot that are younger than `writer_hours` may be a writer's, and stay: then the proof fails,
    and it has to run again.
    Let no other writer be at work: rows that one adds meanwhile are found by the proof, and one that began from a file
    that goes fails.

    Reads key and uri of all files twice; rewrites the files of the newest snapshot that have the rows. Raises PinError
    for pins and channels before anything is changed; CommitConflictError where others commit again and again;
    CorruptFileError where the newest snapshot has a damaged file, which `repair` mends.
    """
    work = _Purge(store=store, storage=store.storage, images=images, writer_s=writer_hours * _HOUR_S, dry_run=dry_run)
    return work.run(progress)


@dataclass(kw_only=True)
class _Purge:
    """One run of a purge."""

    store: FeatureStore
    storage: Storage
    images: Images
    writer_s: float
    dry_run: bool
    report: PurgeReport = field(default_factory=PurgeReport)

    def run(self, progress: Progress | None) -> PurgeReport:
        found: set[int | str] = set()
        for _ in range(_ATTEMPTS):
            before = find_traces(self.storage, self.images, progress)
            traces = before.traces
            found |= before.found
            self.report.without_rows = self.images.without_rows(found)
            self.report.num_rows = max(self.report.num_rows, sum(trace.rows or 0 for trace in traces))
            try:
                if self._remove(traces):
                    break
            except CommitConflictError:
                continue  # another writer was first: start again with its snapshot
        else:
            raise CommitConflictError(Problem.OTHERS_COMMITTED, self.store.url, _ATTEMPTS)
        if not self.dry_run:
            self.report.proof = find_traces(self.storage, self.images, progress)
        return self.report

    def _remove(self, traces: Sequence[Trace]) -> bool:
        """Remove files with traces; return whether no other writer came between."""
        bad = {trace.path for trace in traces if trace.path.startswith(f"{DATA}/")}
        manifests = self._manifests()
        affected = {each.version: each for each in manifests if _paths(each) & bad}
        newest = manifests[-1] if manifests else log.EMPTY
        unread = {trace.path: trace.text for trace in traces if trace.rows is None}
        for path in _paths(newest) & unread.keys():
            way_out = f"crossmedia store repair {self.store.url}, and purge again"
            raise CorruptFileError(Problem.BROKEN_UNTIL_MENDED, unread[path], way_out)
        quarantined = self._quarantined()
        moves = self._moves(affected, newest)
        self.report.expired = tuple(sorted({*self.report.expired, *affected}))
        if not self.dry_run:
            if newest.version in affected:
                newest = self._commit_again(newest, bad)
                self.report.version = newest.version
            for move in moves:
                move_channel(self.store, move.channel, newest.version, f"{PURGE}: snapshot {move.version} has gone")
                self.report.moved.append(move.channel)
            move_aside(self.store, sorted(affected))
            if any(_paths(each) & bad for each in self._manifests()):
                return False  # another process restored or committed such a file meanwhile
        self.report.num_quarantined += len(quarantined)
        if not self.dry_run:
            staging.resolve(self.storage, quarantined)
        # A purge that was cut off may have taken them out of the log already.
        expired = [log.find(self.storage, version) for version in log.versions(self.storage, log.EXPIRED)]
        gone = [*affected.values(), *(each for each in expired if each is not None)]
        self._delete(traces, {path for each in gone for path in _paths(each)})
        return True

    def _manifests(self) -> list[Manifest]:
        """Read all manifests of the log, ascending; without those that an expiry takes out of it meanwhile."""
        found = [log.find(self.storage, version, [log.LOG]) for version in log.versions(self.storage)]
        return [each for each in found if each is not None]

    def _moves(self, affected: dict[int, Manifest], newest: Manifest) -> list[ChannelMove]:
        """Find the channels that follow to the new snapshot.

        Raises PinError for a pin, or a channel of an older snapshot, that keeps one that goes."""
        moves = [move for move in read_channels(self.storage) if move.version in affected]
        # After a kill: the snapshot before a purge's is the same but for the rows.
        same = {newest.commit_id} | ({newest.parent} if newest.operation == PURGE else set())
        pins = [pin for pin in read_pins(self.storage) if pin.version in affected]
        keepers = [f"pin {pin.name} (snapshot {pin.version})" for pin in pins]
        keepers += [f"channel {move.channel} (snapshot {move.version})" for move in moves if move.commit_id not in same]
        if keepers:
            raise PinError(Problem.ROWS_KEPT, self.store.url, ", ".join(keepers))
        return moves

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
        """Rewrite a file without the rows; None if none is left. Raises CorruptFileError."""
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

    def _are_in(self, table: pa.Table) -> BoolArray:
        return self.images.are_in(numpy_column(table, KEY), table[URI])

    def _quarantined(self) -> list[staging.QuarantineRow]:
        """Read all of their rows in quarantine, older ones of a key too. Raises CorruptFileError."""
        names = self.storage.list(staging.QUARANTINE)
        rows = [row for name in names for row in staging.read_file(self.storage, name)]
        keys = set(self.images.keys_N.tolist())
        theirs = [row for row in rows if row.key in keys or row.uri in self.images.uris]
        return sorted(theirs, key=lambda row: row.time_s)

    def _delete(self, traces: Sequence[Trace], named: set[str]) -> None:
        """Delete data files with traces and their statistics, and runs that staged one.

        A file that no snapshot named is removed only if it is old: a writer may be at work on it."""
        now_s, ages_s = self.storage.now(), dict[str, float]()
        for trace in traces:
            *folders, name = trace.path.split("/")
            is_staged = len(folders) > 1 and folders[0] == staging.STAGING
            path = "/".join(folders[:2]) if is_staged else trace.path
            if is_staged or folders[:1] in ([DATA], [DAMAGED]) or name.startswith(TEMPORARY):
                with contextlib.suppress(FileNotFoundError):
                    mtime_s = self.storage.entry(trace.path).mtime_s
                    age_s = math.inf if trace.path in named else now_s - mtime_s
                    ages_s[path] = min(age_s, ages_s.get(path, math.inf))
        self.report.young += [path for path, age_s in ages_s.items() if age_s < self.writer_s]
        doomed = [path for path, age_s in ages_s.items() if age_s >= self.writer_s]
        runs = [path for path in doomed if path.startswith(f"{staging.STAGING}/")]
        files = [path for path in doomed if path not in runs]
        self.report.runs += [path.removeprefix(f"{staging.STAGING}/") for path in runs]
        self.report.num_files += len(files)
        if not self.dry_run:
            for path in runs:
                self.storage.delete(path)
            self.storage.delete_files([path.removesuffix(".parquet") + ".stats.npy" for path in files] + files)


def _paths(manifest: Manifest) -> set[str]:
    return {entry.path for entry in manifest.entries}


def read_images(file: Path, named_by: NamedBy | None = None) -> Images:
    """Read images from a text file of keys or of uris, one on each line.

    With None they are keys where each line is a whole number. Raises KeyFileError.
    """
    try:
        names = [line for line in read_text(file).splitlines() if line.strip()]
        named_by = named_by or ("key" if all(map(_WHOLE_NUMBER.fullmatch, names)) else "uri")
        if not names:
            raise ValueError(Problem.NOTHING_LISTED.of(named_by))
        return Images.of_uris(names) if named_by == "uri" else Images.of_keys(np.array([*map(_key, names)], np.int64))
    except (OSError, ValueError, OverflowError) as error:
        wanted = f"{named_by}s" if named_by else "keys or uris"
        raise KeyFileError(Problem.NOT_A_LIST, file, wanted, error) from error


def _key(line: str) -> int:
    if not _WHOLE_NUMBER.fullmatch(line):
        raise ValueError(Problem.NOT_WHOLE.of(line[:80]))
    return int(line)
