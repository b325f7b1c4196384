"""Histories of published versions: samples that days are added to, and checkpoints of a run with its supervisors."""

import tempfile
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from featurestore.errors import StorageError
from featurestore.published.paths import FarPath
from featurestore.published.versions import VERSIONS, PublishedFiles, expire, open_published, publish, write_part
from featurestore.storage.storage import Storage
from pipeline.samples.publish import MARK, replaced_files
from tests.simulated.history import Entry, History
from tests.simulated.world import Client, seconds
from trainer import supervise
from trainer.runs.folder import finished, step_name, step_of
from trainer.runs.saving import DAMAGED, KEEP_REMOVED_S, CheckpointPlace, WrittenPart


class PublishedHistory(History):
    """Versions of an address; one that was replaced stays for `SPAN_S`."""

    LOG = VERSIONS

    def files_of(self, content: dict[str, Any]) -> list[str]:
        """Return the paths of a version's files."""
        return list(_named(content).values())

    def kept(self) -> set[int]:
        """Return the versions that a reader may have."""
        since_s = self.world.now_s - self.SPAN_S
        return {version for version, each in enumerate(self.log, start=1) if each.end_s > since_s}

    def read(self, storage: Storage, pause: str) -> None:
        """Open the newest version, and read all of its files a while later."""
        self.begin(seconds(pause))
        newest, opened = len(self.log), open_published(storage.url)
        if not isinstance(opened, PublishedFiles):
            return
        version = opened.published.version
        self.world.expect(version >= newest, f"the newest version was {newest}, not {version}")
        self.world.sleep(seconds(pause))
        for name, path in _named(self.log[version - 1].content).items() if self.log[version - 1].is_whole else ():
            is_same = opened.read_bytes(name) == self.store.first[f"{self.PLACE}/{path}"].data
            self.world.expect(is_same, f"{name} is another file")

    def finish(self) -> None:
        """Look at all that is there at the end."""
        self.read(self.opened(), "0s")


class SampleHistory(PublishedHistory):
    """Samples: whole ones, days that are added to them, readers and expiries."""

    PLACE = "w/samples"
    SPAN_S, MOST_S = seconds("1d"), seconds("0.9d")

    def prepare(self, patch: pytest.MonkeyPatch) -> None:
        """Publish the first samples."""
        self.whole(self.opened())

    def whole(self, storage: Storage) -> None:
        """Publish samples that are made of nothing before."""
        number = next(self.unique)
        made = publish(
            storage, {name: write_part(storage, name, f"{name} {number}".encode()) for name in (MARK, "train/whole")}
        )
        self.acknowledge(VERSIONS, made.version, publication=made.publication)

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
        is_there = any(day in _named(each.content) for each in self.log)
        self.world.expect(is_there, "a day that was added was never published")

    def expire(self, storage: Storage) -> None:
        """Remove old versions."""
        expire(storage, self.SPAN_S)

    def created(self, entry: Entry) -> None:
        """See that a version to which a day was added keeps all days before."""
        super().created(entry)
        before, after = (_named(each.content) for each in self.log[-2:]) if len(self.log) > 1 else ({}, {})
        is_added = any(name.startswith("train/day-") for name in after.keys() - before.keys())
        lost = [name for name, path in before.items() if name != MARK and after.get(name) != path]
        self.world.expect(not (is_added and lost), f"a day was added, and {lost} lost")


RUN = FarPath("sim://w/run")
LEASE_S = supervise.LEASE_S


class RunHistory(PublishedHistory):
    """A run: supervisors that hold it one after another, and their trainings, which publish checkpoints."""

    PLACE, SPAN_S = "w/run/checkpoints", KEEP_REMOVED_S
    MOST_S = 400.0
    """From the first part of a checkpoint to its publication."""

    def prepare(self, patch: pytest.MonkeyPatch) -> None:
        """Let supervisors see simulated processes and machines, and do the work of their threads themselves."""
        self.holders: dict[str, tuple[Client, float]] = {}
        """Who believes that the run is its own, and since when."""
        self.ends_s: dict[str, float] = {}
        self.renewals: dict[str, Callable[[], None]] = {}
        """By supervisor, up to when it holds the run, and the work of its thread."""
        system = SimpleNamespace(
            getpid=lambda: 1_000_000_000 + self.world.current.process,  # which no process of this machine has
            uname=lambda: SimpleNamespace(nodename=self.world.current.name),
            kill=lambda process, signal: self.holders.pop(supervise._me(), None),
        )
        patch.setattr(supervise, "os", system)
        event = SimpleNamespace(wait=self.is_at_end, set=lambda: None)
        patch.setattr(supervise, "threading", SimpleNamespace(Event=lambda: event, Thread=self.renewing))

    def renewing(self, target: Callable[[], None], daemon: bool) -> SimpleNamespace:
        """Take the work of a supervisor's thread."""
        return SimpleNamespace(start=lambda: self.renewals.update({supervise._me(): target}), join=lambda: None)

    def is_at_end(self, for_s: float) -> bool:
        """Wait, and tell whether the time of a supervisor is over."""
        self.world.sleep(for_s)
        return self.world.now_s > self.ends_s[supervise._me()]

    def supervise(self, storage: Storage, pause: str) -> None:
        """Hold the run for some time."""
        began_s, me = self.world.now_s, supervise._me()
        self.ends_s[me] = began_s + seconds(pause)
        with supervise.claimed(RUN, LEASE_S):
            self.world.expect(not self.holding(began_s - LEASE_S), f"{me} takes the run, which another one holds")
            self.holders[me] = self.world.current, self.world.now_s
            try:
                self.renewals[me]()
            finally:
                self.holders.pop(me, None)

    def train(self, storage: Storage, num_steps: str, pause: str) -> None:
        """Claim the checkpoints, and write some."""
        place = CheckpointPlace(RUN)
        place.claim()
        first = max((each.step for each in finished(RUN)), default=0) + 1
        for step in range(first, first + int(num_steps)):
            self.world.sleep(seconds(pause))
            self.begin()
            with suppress(StorageError):  # of one checkpoint: the training continues
                rows = write_part(storage, f"{step_name(step)}-rows", f"rows of {step}".encode())
                place.commit(step, {"rows": WrittenPart("0" * 32, rows)}, f"state of {step}".encode(), 2, None)
                made = place._newest_known()
                self.acknowledge(VERSIONS, made.version, publication=made.publication)
                is_named = rows.path in self.log[made.version - 1].files
                self.world.expect(is_named, f"checkpoint {step} was acknowledged, and version {made.version} lacks it")

    def holding(self, awake_s: float) -> list[float]:
        """Return from when on each holds the run who has been awake since a time."""
        return [at_s for client, at_s in self.holders.values() if client.disturbed_s < awake_s]

    def watch(self, verb: str, path: str, data: bytes | None) -> None:
        """See that whoever was followed by another one stops soon after it is awake again."""
        super().watch(verb, path, data)
        since_s = self.world.now_s - LEASE_S
        self.world.expect(sum(at_s < since_s for at_s in self.holding(since_s)) < 2, "two hold the run at once")

    def created(self, entry: Entry) -> None:
        """See that whoever was followed by another publishes nothing more, and that the newest checkpoint stays."""
        super().created(entry)
        *before, by = [each.by for each in self.log]
        is_followed = by in before and by != before[-1]
        self.world.expect(not is_followed, "a training publishes though another one has claimed the run")
        files = _named(entry.content)
        for last in [each for each in self.log[:-1] if each.is_acknowledged][-1:]:
            newest = max(map(_step, _named(last.content)))
            is_kept = f"{step_name(newest)}/rows" in files or newest < min(map(_step, files), default=0)
            self.world.expect(is_kept, f"the newest checkpoint, {newest}, is lost")


def _named(content: dict[str, Any]) -> dict[str, str]:
    """Return the paths of a version's files by their names."""
    return {name: each["path"] for name, each in content["files"].items()}


def _step(name: str) -> int:
    """Return the step of the checkpoint that a file is of."""
    return step_of(name.removeprefix(DAMAGED).partition("/")[0])
