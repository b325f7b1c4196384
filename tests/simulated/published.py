"""Histories of published versions: samples that days are added to, and checkpoints of a run."""

import tempfile
from contextlib import suppress
from typing import Any

import pytest

from featurestore.errors import StorageError
from featurestore.published.paths import FarPath
from featurestore.published.versions import VERSIONS, PublishedFiles, expire, open_published, publish, write_part
from featurestore.storage.storage import Storage
from pipeline.samples.publish import MARK, replaced_files
from tests.simulated.history import Entry, History
from tests.simulated.world import seconds
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


class RunHistory(PublishedHistory):
    """A run: trainings that take it over one after another, and publish checkpoints."""

    PLACE, SPAN_S = "w/run/checkpoints", KEEP_REMOVED_S
    MOST_S = 400.0
    """From the first part of a checkpoint to its publication."""

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
