"""The snapshots of one store that a server has open: the newest, and others for as long as somebody asks for them."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from featurestore.errors import FeatureStoreError, SnapshotNotFoundError, UnavailableError
from featurestore.lookup.partition import FeaturePartition
from featurestore.published.channels import VersionName
from featurestore.storage.threads import Progress
from featurestore.store import FeatureStore

MAX_OPEN = 4
KEEP_S = 600.0


@dataclass
class _Opened:
    lock: threading.Lock = field(default_factory=threading.Lock)  # held while it is opened
    partition: FeaturePartition | None = None
    users: int = 0
    used_s: float = field(default_factory=time.monotonic)


class OpenSnapshots:
    """Partitions of some shards, one for each open snapshot. Any number of threads may ask at once.

    Up to `max_open` are open together; what nobody used for `keep_s` is let go, except the newest. With a `version`
    that one alone is offered, and it counts as the newest; with a channel the snapshot that it points to does.
    """

    def __init__(
        self,
        store: FeatureStore,
        shards: Sequence[int],
        *,
        version: VersionName | None = None,
        cache_dir: Path | None = None,
        progress: Progress | None = None,
        max_open: int = MAX_OPEN,
        keep_s: float = KEEP_S,
    ) -> None:
        self.store, self.shards, self.fixed = store, tuple(shards), isinstance(version, int)
        self._channel = version if isinstance(version, str) else None
        self._progress = progress  # of the first one, which may have to be built
        self._cache_dir, self._max_open, self._keep_s = cache_dir, max_open, keep_s
        self._lock = threading.Lock()
        self._opened: dict[int, _Opened] = {}
        self.newest = store.snapshot(version).version
        with self.use(None):
            self._progress = None

    @contextmanager
    def use(self, version: int | None) -> Iterator[FeaturePartition]:
        """Lend the partition of a snapshot, by default of the newest; opened first where it is not.

        Raises SnapshotNotFoundError, CorruptFileError, StorageError; UnavailableError where too many others are used.
        """
        wanted = self._offered(version)
        opened = self._taken(wanted)
        try:
            with opened.lock:
                if opened.partition is None:
                    opened.partition = FeaturePartition.load(
                        self.store,
                        cache_dir=self._cache_dir,
                        missing="zeros",
                        version=wanted,
                        progress=self._progress,
                        shards=self.shards,
                    )
            yield opened.partition
        finally:
            with self._lock:
                opened.users -= 1
                opened.used_s = time.monotonic()
                if opened.partition is None and opened.users == 0:  # it could not be opened
                    self._opened.pop(wanted, None)

    def follow(self) -> bool:
        """Open the newest snapshot of the store, or the channel's, and offer it; return whether it is another one.

        Without a channel a snapshot is opened where it is newer; with one, where the channel was moved. Raises what
        opening raises; the one before stays the newest.
        """
        newest = self.newest if self.fixed else self.store.snapshot(self._channel).version
        if newest > self.newest or (self._channel is not None and newest != self.newest):
            with self.use(newest):
                self.newest = newest
            return True
        return False

    def let_go(self) -> None:
        """Close what nobody has used for a while, except the newest."""
        with self._lock:
            before_s = time.monotonic() - self._keep_s
            self._close([version for version in self._idle() if self._opened[version].used_s <= before_s])

    @property
    def versions(self) -> list[int]:
        """The snapshots that are open, ascending."""
        with self._lock:
            return sorted(self._opened)

    def close(self) -> None:
        """Close all that nobody uses."""
        with self._lock:
            self._close([version for version, opened in self._opened.items() if opened.users == 0])

    def _offered(self, version: int | None) -> int:
        if version is not None and self.fixed and version != self.newest:
            raise SnapshotNotFoundError(f"this server offers snapshot {self.newest} of {self.store.url} alone")
        return self.newest if version is None else version

    def _taken(self, version: int) -> _Opened:
        with self._lock:
            if version not in self._opened:
                excess = len(self._opened) + 1 - self._max_open
                if excess > 0:
                    self._close(self._idle()[:excess])
                if len(self._opened) >= self._max_open:
                    raise UnavailableError(f"{len(self._opened)} other snapshots are in use here: try again later")
                self._opened[version] = _Opened()
            self._opened[version].users += 1
            return self._opened[version]

    def _idle(self) -> list[int]:
        """List what nobody uses, the longest unused first; never the newest."""
        idle = [version for version, each in self._opened.items() if each.users == 0 and version != self.newest]
        return sorted(idle, key=lambda version: self._opened[version].used_s)

    def _close(self, versions: Sequence[int]) -> None:
        for version in versions:
            partition = self._opened.pop(version).partition
            if partition is not None:
                partition.close()


class Follower:
    """A thread that lets a server follow its store: looks for a newer snapshot, and lets old ones go."""

    def __init__(self, snapshots: OpenSnapshots, poll_s: float, report: Callable[[str], None]) -> None:
        self._snapshots, self._poll_s, self._report = snapshots, poll_s, report
        self._stopped = threading.Event()
        self._said = ""
        self._thread = threading.Thread(target=self._run, name="follow", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; one that is just opening a snapshot ends with the process."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._poll_s):
            try:
                if self._snapshots.follow():
                    self._say(f"offers snapshot {self._snapshots.newest}")
                self._snapshots.let_go()
            except FeatureStoreError as error:
                self._say(f"stays at snapshot {self._snapshots.newest}: {error}")

    def _say(self, line: str) -> None:
        """Report a line, but not again and again."""
        if line != self._said:
            self._said = line
            self._report(line)
