"""Histories of published versions: samples that days are added to, and checkpoints of a run with its supervisors."""

import re
import tempfile
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from featurestore.errors import CommitConflictError, StorageError
from featurestore.log import manifest_path
from featurestore.published.paths import FarPath
from featurestore.published.versions import VERSIONS, PublishedFiles, expire, open_published, publish, write_part
from featurestore.storage.storage import Storage
from pipeline.errors import SampleError
from pipeline.samples.publish import MARK, replaced_files
from tests.simulated.history import Entry, History
from tests.simulated.world import Client, seconds
from trainer import supervise as supervised_run
from trainer.errors import CheckpointError, ConfigError
from trainer.runs.folder import finished, step_name, step_of
from trainer.runs.saving import KEEP_REMOVED_S, CheckpointPlace, WrittenPart

DAY_S = seconds("1d")


class PublishedHistory(History):
    """Versions of an address; files of one that was replaced stay for `SPAN_S`."""

    def needed(self) -> Collection[str]:
        """Return the newest version, and the files of those that a reader may have."""
        kept = [each for each, end_s in self.with_ends(VERSIONS) if self.world.now_s - end_s < self.SPAN_S]
        return {
            manifest_path(len(self.logs[VERSIONS]), VERSIONS),
            *(p for each in kept for p in files_of(each).values()),
        }

    def check(self, files: PublishedFiles) -> None:
        """Read all files of a version, and compare them with those that were written."""
        version = files.published.version
        for name, path in files_of(self.logs[VERSIONS][version - 1]).items():
            try:
                self.world.expect(files.read_bytes(name) == self.first[path], f"{name} is another file")
            except FileNotFoundError:
                self.world.expect(path not in self.needed(), f"version {version} lacks {name}")


def files_of(version: Entry) -> dict[str, str]:
    """Return the paths of a version's files by their names."""
    return {name: each["path"] for name, each in version.content["files"].items()}


class SampleHistory(PublishedHistory):
    """Samples: whole ones, days that are added to them, readers and expiries."""

    PLACE, SPAN_S = "w/samples", DAY_S
    TABLES = ({"add": 4, "whole {at-once,at-once,at-once,late}": 2, "expire": 3, "read {0s,600s,0.7d}": 4},)
    DECIDES = ("create .*/versions/", "delete .*/(versions|files)/", "(list|read) .*/versions", "list .*/files")
    GOOD = (StorageError, CommitConflictError, SampleError)
    MOST_S = 0.9 * DAY_S

    def prepare(self, patch: pytest.MonkeyPatch) -> None:
        """Publish the first samples."""
        self.num_expiring = 0
        self.whole(self.opened(), "at-once")

    def whole(self, storage: Storage, when: str) -> None:
        """Publish samples that are made of nothing before; now and then so late that an expiry takes their files."""
        number = next(self.unique)
        files = {name: write_part(storage, name, f"{name} of {number}".encode()) for name in (MARK, "train/whole")}
        if when == "late" and not self.num_expiring:
            self.world.sleep(2 * DAY_S)
            self.world.current.patience_s = self.world.now_s
            if self.num_expiring:  # it may have looked at these files already
                return
        made = publish(storage, files)
        self.acknowledge(VERSIONS, made.version, "publication", made.publication)

    def add(self, storage: Storage) -> None:
        """Add a day to the samples."""
        before, day = open_published(storage.url), f"train/day-{next(self.unique)}"
        with (
            tempfile.TemporaryDirectory() as scratch,
            replaced_files(storage.url, before=before, scratch=scratch, keep_days=1) as new,
        ):
            (new.folder / "train").mkdir()
            (new.folder / day).write_text(day)
            (new.folder / MARK).write_text(f"with {day}")
            for name in before.list("train"):
                new.keep(f"train/{name}", f"train/{name}")
        is_there = any(day in files_of(each) for each in self.logs[VERSIONS])
        self.world.expect(is_there, "a day that was added was never published")

    def expire(self, storage: Storage) -> None:
        """Remove old versions."""
        self.num_expiring += 1
        try:
            expire(storage, DAY_S)
        finally:
            self.num_expiring -= 1

    def read(self, storage: Storage, pause: str) -> None:
        """Open the newest version, and read it a while later."""
        newest, files = len(self.logs[VERSIONS]), open_published(storage.url)
        assert isinstance(files, PublishedFiles)
        version = files.published.version
        self.world.expect(version >= newest, f"the newest version was {newest}, not {version}")
        self.world.sleep(seconds(pause))
        self.check(files)

    def created(self, folder: str, made: Entry) -> None:
        """See that a version to which a day was added keeps all days before."""
        after = files_of(made)
        for before in map(files_of, self.logs[VERSIONS][-2:-1]):
            is_added = any(name.startswith("train/day-") for name in after.keys() - before.keys())
            lost = {name for name, path in before.items() if name != MARK and after.get(name) != path}
            self.world.expect(not (is_added and lost), f"a day was added, and {lost} lost")

    def finish(self) -> None:
        """Look at all that is there at the end."""
        super().finish()
        self.read(self.opened(), "0s")


RUN = FarPath("sim://w/run")
CLAIMS = "w/.run.supervised/"
LEASE_S = supervised_run.LEASE_S


@dataclass(eq=False)
class Holder:
    """A process that asks for the run, or holds it."""

    client: Client
    process: int
    began_s: float
    claimed_s: float = float("inf")
    holds: bool = False
    told_to_stop: bool = False

    def is_at_work(self) -> bool:
        """Tell whether it believes that the run is its own."""
        return self.holds and not self.told_to_stop and not self.client.is_killed


class RunHistory(PublishedHistory):
    """A run: supervisors that hold it one after another, and their trainings, which publish checkpoints."""

    PLACE, SPAN_S = "w/run/checkpoints", KEEP_REMOVED_S
    SUPERVISE, TRAIN = "supervise {1,2,3} {1s,30s,400s}", "train {1,2,3} {1s,30s,400s}"
    TABLES = ({SUPERVISE: 1}, {SUPERVISE: 1, TRAIN: 1}, {SUPERVISE: 2, "read {0s,60s,420s}": 1})
    DECIDES = (
        "create .*/versions/", "(list|read) .*/versions", "list .*/files", "(create|overwrite|list) .*supervised",
    )  # fmt: skip
    GOOD = (StorageError, CheckpointError, ConfigError)

    def prepare(self, patch: pytest.MonkeyPatch) -> None:
        """Let supervisors see simulated threads, processes and machines."""
        self.holders: dict[bytes, Holder] = {}
        self.trainings: dict[CheckpointPlace, float] = {}
        """With the time at which what they publish next was begun."""
        self.writers: list[CheckpointPlace] = []
        self.kept: list[tuple[int, str]] = []
        """Acknowledged checkpoints: the step, and the path of its rows."""
        self.gone: set[str] = set()
        """Files that were removed as they waited too long for the version that names them."""
        world = self.world
        system = SimpleNamespace(
            getpid=lambda: world.current.process,
            uname=lambda: SimpleNamespace(nodename=world.current.main.name),
            kill=lambda process, signal: setattr(self._holder(), "told_to_stop", True),
        )
        patch.setattr(supervised_run, "os", system)
        patch.setattr(supervised_run, "threading", SimpleNamespace(Event=world.event, Thread=world.thread))
        patch.setattr(supervised_run, "Path", self._process_path)

    def supervise(self, storage: Storage, num_steps: str, pause: str) -> None:
        """Hold the run, and train."""
        me = self.world.current
        holder = self.holders[supervised_run._me().encode()] = Holder(me, me.process, self.world.now_s)
        with supervised_run.claimed(RUN, LEASE_S):
            holder.holds = True
            try:
                self.train(storage, num_steps, pause)
            finally:
                holder.holds = False

    def train(self, storage: Storage, num_steps: str, pause: str) -> None:
        """Claim the checkpoints, and write some; who supervises nothing is a rank that its supervisor left behind."""
        holder, place = self._holder(), CheckpointPlace(RUN)
        self.trainings[place] = self.world.now_s
        place.claim()
        first = max((each.step for each in finished(RUN)), default=0) + 1
        for step in range(first, first + int(num_steps)):
            self.world.sleep(seconds(pause))
            if holder and holder.told_to_stop:
                return
            data, self.trainings[place] = f"rows of {step}".encode(), self.world.now_s
            with suppress(StorageError):  # of one checkpoint: the training continues
                rows = WrittenPart("0" * 32, write_part(storage, f"{step_name(step)}-rows", data))
                place.commit(step, {"rows": rows}, f"state of {step}".encode(), 2, None)
                made = place._newest_known()
                self.acknowledge(VERSIONS, made.version, "publication", made.publication)
                if self.is_there(rows.file.path):
                    self.kept.append((step, rows.file.path))
                is_named = rows.file.path in files_of(self.logs[VERSIONS][made.version - 1]).values()
                self.world.expect(is_named, f"checkpoint {step} was acknowledged, and version {made.version} lacks it")

    def read(self, storage: Storage, pause: str) -> None:
        """Open the newest checkpoint, and read it a while later."""
        if found := finished(RUN):
            self.world.current.patience_s = self.world.now_s + 0.9 * KEEP_REMOVED_S
            self.world.sleep(seconds(pause))
            self.check(found[-1].files)

    def watch(self, verb: str, path: str, data: bytes | None) -> None:
        """See that nobody takes a run whose holder is at work, and nobody continues after another one took it."""
        super().watch(verb, path, data)
        if not path.startswith(CLAIMS) or data not in self.holders:
            return
        writer, now_s = self.holders[data], self.world.now_s
        others = [each for each in self.holders.values() if each is not writer and each.is_at_work()]
        if verb == "create":
            writer.claimed_s = now_s
            awake = [each for each in others if each.client.disturbed_s < writer.began_s - LEASE_S]
            self.world.expect(not awake, f"{data!r} takes the run, which another one holds")
        elif path in self.store.objects:
            there = self.store.objects[path].data
            self.world.expect(there in (data, b""), f"{data!r} renews a claim that is {there!r}'s: two hold the run")
            later_s = [each.claimed_s for each in others if writer.claimed_s < each.claimed_s < now_s]
            is_told = later_s and now_s - max(later_s[0], writer.client.disturbed_s) > LEASE_S
            self.world.expect(not is_told, f"{data!r} continues, though another one took the run long ago")

    def created(self, folder: str, made: Entry) -> None:
        """See that whoever was followed by another publishes nothing more, and that the newest checkpoint stays."""
        writer = next(each for each in self.trainings if made.content["publication"] in each._tried)
        is_followed = writer in self.writers and writer is not self.writers[-1]
        self.world.expect(not is_followed, "a training publishes though another one has claimed the run")
        self.writers.append(writer)
        files = files_of(made)
        gone = {path for path in files.values() if not self.is_there(path)}
        is_late = self.world.now_s - self.trainings[writer] > self.SPAN_S
        self.world.expect(is_late or not gone, f"a version is published without {gone}")
        self.gone |= gone
        first = min((step_of(name.partition("/")[0]) for name in files), default=0)
        lost = [step for step, path in self.kept[-1:] if step >= first and path not in files.values()]
        self.world.expect(not lost, f"the newest checkpoint, {lost}, is lost")

    def needed(self) -> Collection[str]:
        """Return the newest version, and the files of those that a reader may have."""
        return set(super().needed()) - self.gone

    def finish(self) -> None:
        """Look at all that is there at the end."""
        super().finish()
        self.read(self.opened(), "0s")

    def _holder(self) -> Holder | None:
        return self.holders.get(supervised_run._me().encode())

    def _process_path(self, path: str) -> Any:
        """Give what `Path` says of a process on the machine of the client that asks."""
        number = re.fullmatch(r"/proc/(\d+)", path)
        is_there = number is not None and int(number[1]) == self.world.current.process
        return SimpleNamespace(exists=lambda: is_there)
