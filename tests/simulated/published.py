"""Histories of samples that are published day by day: whole ones, days that are added to them, readers and expiries."""

import json
import random
import tempfile
from dataclasses import dataclass, field

from featurestore.errors import CommitConflictError, StorageError
from featurestore.log import version_of
from featurestore.published.versions import FILES, VERSIONS, PublishedFiles, expire, open_published, publish, write_part
from featurestore.storage.storage import Storage
from pipeline.errors import SampleError
from pipeline.samples.publish import MARK, replaced_files
from tests.simulated.world import DAY_S, Aim, History, Plan, World, do, draw_plan

PLACE = "w/samples"
KEEP_S = DAY_S
MOST_S = 0.9 * KEEP_S
"""From the first file of a publication to its end, and from the opening of a version to its last file."""
WEIGHTS = {"add": 4, "whole": 2, "expire": 3, "read": 4}
DECIDES = ("create .*/versions/", "delete .*/(versions|files)/", "(list|read) .*/versions", "list .*/files")
AT_ONCE, LATE = 1, 4
SCENES: tuple[Plan, ...] = (
    [[do("whole", LATE)], [do("expire", 0, 1.3 * KEEP_S)]],
    [[do("add", 1, 1.2 * KEEP_S), do("expire", 0, 1)]],
    [[do("whole", AT_ONCE, 0, Aim("create .*/versions/", 60))], [do("expire", 0, 10)]],
    [[do("add", 1, 0, Aim("create .*/versions/", 60))], [do("add", 2, 10)]],
)


@dataclass
class Published:
    """A version as it was created: where its files lie by name, and when another took its place."""

    publication: str
    files: dict[str, str]
    replaced_s: float = float("inf")


@dataclass
class PublishedLog:
    """The versions of an address, noted as they are created; what is removed of them is looked at."""

    world: World
    place: str
    keep_s: float
    versions: list[Published] = field(default_factory=list)
    written: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.world.watchers.append(self.watch)

    def watch(self, action: str, path: str, data: bytes | None) -> None:
        """Note a version; see that nothing is removed that a reader may have, and nothing written twice."""
        folder, _, name = path.removeprefix(f"{self.place}/").rpartition("/")
        if folder == VERSIONS and action == "create" and data is not None:
            self._note(json.loads(data))
        elif folder == VERSIONS:
            self.world.expect((version_of(name) or 0) < len(self.versions), "the newest version is removed")
        elif folder == FILES and data is not None:
            known = self.written.setdefault(path, data)
            self.world.expect(known == data, f"{path} is written twice")
        elif folder == FILES:
            kept = [v for v in self.versions if self.world.now_s - v.replaced_s < self.keep_s]
            needed = any(f"{folder}/{name}" in version.files.values() for version in kept)
            self.world.expect(not needed, f"{path} is removed, which a version of the last day needs")

    def read(self, files: PublishedFiles) -> None:
        """Read all files of a version, and compare them with those that were written."""
        for name, path in self.versions[files.published.version - 1].files.items():
            try:
                found = files.read_bytes(name)
            except FileNotFoundError:
                self.world.fail(f"version {files.published.version} lacks {name}")
            self.world.expect(found == self.written[f"{self.place}/{path}"], f"{name} is another file")

    def _note(self, made: dict) -> None:
        if made["version"] <= len(self.versions):
            return  # of a writer that was away, which finds out
        if self.versions:
            self.versions[-1].replaced_s = self.world.now_s
        self.versions.append(Published(made["publication"], {n: each["path"] for n, each in made["files"].items()}))


@dataclass
class PublishedHistory(History):
    """Samples, and what is known of them."""

    GOOD = (StorageError, CommitConflictError, SampleError)
    PLACE, MOST_S, DECIDES, SCENES = PLACE, MOST_S, DECIDES, SCENES

    world: World
    acknowledged: list[str] = field(default_factory=list)
    days: list[str] = field(default_factory=list)
    expiring: int = 0

    @staticmethod
    def plan(draw: random.Random) -> Plan:
        """Draw what clients do."""
        return draw_plan(draw, WEIGHTS, KEEP_S, DECIDES)

    def prepare(self) -> None:
        """Publish the first samples."""
        self.log = PublishedLog(self.world, PLACE, KEEP_S)
        self.whole(self.opened(), AT_ONCE)

    def whole(self, storage: Storage, number: int) -> None:
        """Publish samples that are made of nothing before; now and then so late that an expiry takes their files."""
        names = (MARK, f"train/whole-{number}")
        files = {name: write_part(storage, name, f"{name} of {number}".encode()) for name in names}
        if number % 4 == 0 and not self.expiring:
            self.world.sleep(2 * KEEP_S)
            self.world.current.patience_s = self.world.now_s
            if self.expiring:  # it may have looked at these files already
                return
        self.acknowledged.append(publish(storage, files).publication)

    def add(self, storage: Storage, number: int) -> None:
        """Add a day to the samples."""
        before, day = open_published(storage.url), f"train/day-{number}"
        with (
            tempfile.TemporaryDirectory() as scratch,
            replaced_files(storage.url, before=before, scratch=scratch, keep_days=KEEP_S / DAY_S) as new,
        ):
            (new.folder / "train").mkdir()
            (new.folder / day).write_text(f"{day}")
            (new.folder / MARK).write_text(f"with {day}")
            for name in before.list("train"):
                new.keep(f"train/{name}", f"train/{name}")
        self.days.append(day)

    def expire(self, storage: Storage, number: int) -> None:
        """Remove old versions."""
        self.expiring += 1
        try:
            expire(storage, KEEP_S)
        finally:
            self.expiring -= 1

    def read(self, storage: Storage, number: int) -> None:
        """Open the newest version, and read it a while later."""
        newest, files = len(self.log.versions), open_published(storage.url)
        assert isinstance(files, PublishedFiles)
        found = files.published.version
        self.world.expect(found >= newest, f"the newest version was {newest}, not {found}")
        self.world.sleep([0.0, 600.0, 0.7 * KEEP_S][number % 3])
        self.log.read(files)

    def finish(self) -> None:
        """Look at all that is there at the end."""
        made = [each.publication for each in self.log.versions]
        for publication in self.acknowledged:
            self.world.expect(made.count(publication) == 1, f"{publication} is there {made.count(publication)} times")
        published = {name for version in self.log.versions for name in version.files}
        self.world.expect(published >= set(self.days), "a day that was added was never published")
        for before, after in zip(self.log.versions, self.log.versions[1:], strict=False):
            if any(name.startswith("train/day-") and name not in before.files for name in after.files):
                lost = {n: p for n, p in before.files.items() if n != MARK and after.files.get(n) != p}
                self.world.expect(not lost, f"a day was added, and {list(lost)} lost")
        newest = open_published(f"sim://{PLACE}")
        assert isinstance(newest, PublishedFiles)
        self.world.expect(newest.published.version == len(made), f"the newest version is not {len(made)}")
        self.log.read(newest)
