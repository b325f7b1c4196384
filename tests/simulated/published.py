"""Histories of published versions: samples that days are added to, and checkpoints of a run with its supervisors."""

import tempfile
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from featurestore.errors import StorageError
from featurestore.published.paths import FarPath
from featurestore.published.versions import VERSIONS, PublishedFiles, expire, open_published, publish, write_part
from featurestore.storage.storage import Storage
from pipeline.samples.publish import MARK, replaced_files
from tests.simulated.history import History
from tests.simulated.world import Client, seconds
from trainer import supervise
from trainer.runs.folder import finished, step_name, step_of
from trainer.runs.saving import DAMAGED, KEEP_REMOVED_S, CheckpointPlace, WrittenPart


class PublishedHistory(History):
    """Versions of an address; one that was replaced stays for `SPAN_S`."""

    LOG = VERSIONS

    def named(self, version: int) -> dict[str, str]:
        """Return the paths of a version's files by their names."""
        return {name: each["path"] for name, each in self.logs[VERSIONS][version - 1].content["files"].items()}

    def files(self, version: int) -> list[str]:
        """Return the paths of a version's files."""
        return list(self.named(version).values())

    def kept(self) -> set[int]:
        """Return the versions that a reader may have."""
        since_s = self.world.now_s - self.SPAN_S
        return {version for version, each in enumerate(self.logs[VERSIONS], start=1) if each.end_s > since_s}

    def read(self, storage: Storage, pause: str) -> None:
        """Open the newest version, and read all of its files a while later."""
        newest, opened = self.newest, open_published(storage.url)
        if not isinstance(opened, PublishedFiles):
            return
        version = opened.published.version
        self.world.expect(version >= newest, f"the newest version was {newest}, not {version}")
        self.world.sleep(seconds(pause))
        for name, path in self.named(version).items():
            try:
                self.world.expect(opened.read_bytes(name) == self.first[path], f"{name} is another file")
            except FileNotFoundError:
                self.world.expect(path not in self.needed(), f"version {version} lacks {name}")

    def finish(self) -> None:
        """Look at all that is there at the end."""
        super().finish()
        self.read(self.opened(), "0s")


class SampleHistory(PublishedHistory):
    """Samples: whole ones, days that are added to them, readers and expiries."""

    PLACE = "w/samples"
    SPAN_S, MOST_S = seconds("1d"), seconds("0.9d")

    def prepare(self, patch: pytest.MonkeyPatch) -> None:
        """Publish the first samples."""
        self.whole(self.opened())

    def whole(self, storage: Storage, pause: str = "0s") -> None:
        """Publish samples that are made of nothing before, perhaps so late that an expiry has taken their files."""
        number = next(self.unique)
        files = {name: write_part(storage, name, f"{name} of {number}".encode()) for name in (MARK, "train/whole")}
        self.world.sleep(seconds(pause))
        made = publish(storage, files)
        self.acknowledged.append((VERSIONS, made.version, "publication", made.publication))

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
        is_there = any(day in self.named(version) for version in range(1, self.newest + 1))
        self.world.expect(is_there, "a day that was added was never published")

    def expire(self, storage: Storage) -> None:
        """Remove old versions."""
        expire(storage, self.SPAN_S)

    def created(self, content: dict[str, Any]) -> None:
        """See that a version to which a day was added keeps all days before."""
        after, before = self.named(self.newest), self.named(self.newest - 1) if self.newest > 1 else {}
        is_added = any(name.startswith("train/day-") for name in after.keys() - before.keys())
        lost = [name for name, path in before.items() if name != MARK and after.get(name) != path]
        self.world.expect(not (is_added and lost), f"a day was added, and {lost} lost")


RUN = FarPath("sim://w/run")
CLAIMS = "w/.run.supervised/"
LEASE_S = supervise.LEASE_S


@dataclass(eq=False)
class Trainer:
    """A process that trains, perhaps as it holds the run; when it began to ask, to hold it, and what it writes now."""

    client: Client
    began_s: float
    claimed_s: float = float("inf")
    writes_s: float = 0.0
    holds: bool = False
    is_told_to_stop: bool = False

    def is_at_work(self) -> bool:
        """Tell whether it believes that the run is its own."""
        return self.holds and not self.is_told_to_stop and not self.client.is_killed


class RunHistory(PublishedHistory):
    """A run: supervisors that hold it one after another, and their trainings, which publish checkpoints."""

    PLACE, SPAN_S = "w/run/checkpoints", KEEP_REMOVED_S

    def prepare(self, patch: pytest.MonkeyPatch) -> None:
        """Let supervisors see simulated threads, processes and machines."""
        self.trainers: dict[bytes, Trainer] = {}
        self.writers: list[Trainer] = []
        self.saved: list[tuple[int, str]] = []
        """Acknowledged checkpoints: the step, and the path of its rows."""
        self.gone: set[str] = set()
        """Files of checkpoints of which one was removed as it waited too long for the version that names it."""
        world = self.world
        system = SimpleNamespace(
            getpid=lambda: 1_000_000_000 + world.current.process,  # which no process of this machine has
            uname=lambda: SimpleNamespace(nodename=world.current.main.name),
            kill=lambda process, signal: setattr(self.mine, "is_told_to_stop", True),
        )
        patch.setattr(supervise, "os", system)
        patch.setattr(supervise, "threading", SimpleNamespace(Event=world.event, Thread=world.thread))

    @property
    def mine(self) -> Trainer:
        """What is known of the process that runs; it is known from when it is first asked for."""
        fresh = Trainer(self.world.current.main, self.world.now_s)
        return self.trainers.setdefault(supervise._me().encode(), fresh)

    def supervise(self, storage: Storage, num_steps: str, pause: str) -> None:
        """Hold the run, and train."""
        mine = self.mine
        with supervise.claimed(RUN, LEASE_S):
            self.expect_alone(mine)
            mine.holds = True
            try:
                self.train(storage, num_steps, pause)
            finally:
                mine.holds = False

    def train(self, storage: Storage, num_steps: str, pause: str) -> None:
        """Claim the checkpoints, and write some; who supervises nothing is a rank that its supervisor left behind."""
        mine, place = self.mine, CheckpointPlace(RUN)
        mine.writes_s = self.world.now_s
        place.claim()
        first = max((each.step for each in finished(RUN)), default=0) + 1
        for step in range(first, first + int(num_steps)):
            self.world.sleep(seconds(pause))
            if mine.is_told_to_stop:
                return
            mine.writes_s = self.world.now_s
            with suppress(StorageError):  # of one checkpoint: the training continues
                rows = write_part(storage, f"{step_name(step)}-rows", f"rows of {step}".encode())
                place.commit(step, {"rows": WrittenPart("0" * 32, rows)}, f"state of {step}".encode(), 2, None)
                made = place._newest_known()
                self.acknowledged.append((VERSIONS, made.version, "publication", made.publication))
                is_named = rows.path in self.files(made.version)
                self.world.expect(is_named, f"checkpoint {step} was acknowledged, and version {made.version} lacks it")
                self.world.expect(rows.path not in self.gone, f"checkpoint {step} was acknowledged without its rows")
                self.saved += [(step, rows.path)] if self.is_there(rows.path) else []

    def watch(self, verb: str, path: str, data: bytes | None) -> None:
        """See that nobody takes a run whose holder is at work, and nobody continues after another one took it."""
        super().watch(verb, path, data)
        if not path.startswith(CLAIMS) or data not in self.trainers:
            return
        writer, now_s = self.trainers[data], self.world.now_s
        others = [each for each in self.trainers.values() if each is not writer and each.is_at_work()]
        is_highest = not any(other > path for other in self.store.objects if other.startswith(f"{CLAIMS}0"))
        if verb == "create":
            writer.claimed_s = now_s
            if is_highest:
                self.expect_alone(writer)  # else it looks again, and gives up
        elif path in self.store.objects:
            there = self.store.objects[path].data
            is_own = there in (data, b"") or not is_highest  # a lower one holds nothing
            self.world.expect(is_own, f"{data!r} renews a claim that is {there!r}'s: two hold the run")
            later_s = [each.claimed_s for each in others if writer.claimed_s < each.claimed_s < now_s]
            is_told = later_s and now_s - max(later_s[0], writer.client.disturbed_s) > LEASE_S
            self.world.expect(not is_told, f"{data!r} continues, though another one took the run long ago")

    def expect_alone(self, trainer: Trainer) -> None:
        """See that no other one is at work who was awake since before this one looked at the claims."""
        others = [each for each in self.trainers.values() if each is not trainer and each.is_at_work()]
        awake = [each for each in others if each.client.disturbed_s < trainer.began_s - LEASE_S]
        self.world.expect(not awake, f"{trainer.client.name} takes the run, which another one holds")

    def created(self, content: dict[str, Any]) -> None:
        """See that whoever was followed by another publishes nothing more, and that the newest checkpoint stays."""
        writer, files = self.mine, self.named(self.newest)
        is_followed = writer in self.writers and writer is not self.writers[-1]
        self.world.expect(not is_followed, "a training publishes though another one has claimed the run")
        self.writers.append(writer)
        lacking = {_step(name) for name, path in files.items() if not self.is_there(path)}
        gone = {path for name, path in files.items() if _step(name) in lacking}
        is_late = self.world.now_s - writer.writes_s > self.SPAN_S
        self.world.expect(is_late or not gone, f"a version is published without {gone}")
        self.gone |= gone
        first = min((_step(name) for name in files), default=0)
        lost = [step for step, path in self.saved[-1:] if step >= first and path not in files.values()]
        self.world.expect(not lost, f"the newest checkpoint, {lost}, is lost")

    def needed(self) -> set[str]:
        """Return the paths that have to stay as they are now."""
        return super().needed() - self.gone


def _step(name: str) -> int:
    """Return the step of the checkpoint that a file is of."""
    return step_of(name.removeprefix(DAMAGED).partition("/")[0])
