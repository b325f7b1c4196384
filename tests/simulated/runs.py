"""Histories of a run: supervisors that hold it one after another, and their trainings, which publish checkpoints."""

import random
import re
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from featurestore.errors import StorageError
from featurestore.published.paths import FarPath
from featurestore.published.versions import write_part
from featurestore.storage.storage import Storage
from tests.simulated.published import PublishedLog
from tests.simulated.world import Aim, Client, History, Plan, World, do, draw_plan
from trainer import supervise as supervised_run
from trainer.errors import CheckpointError, ConfigError
from trainer.runs.folder import Checkpoint, finished, step_name
from trainer.runs.saving import KEEP_REMOVED_S, CheckpointPlace, WrittenPart

RUN = FarPath("sim://w/run")
CLAIMS, PLACE = "w/.run.supervised", "w/run/checkpoints"
LEASE_S = supervised_run.LEASE_S
KEEP = 2
DECIDES = ("create .*/versions/", "(list|read) .*/versions", "list .*/files", "(create|overwrite|list) .*supervised")
ONE_STEP, TWO_STEPS, SLOW_STEPS = 0, 1, 8
"""Arguments of trainings: a step in a second, two, or three that take 400 s each."""
AT_VERSION, AT_RENEWAL = "create .*/versions/", "overwrite .*supervised/"
SCENES: tuple[Plan, ...] = (
    [  # a training is away until the number of its version has expired
        [do("train", ONE_STEP, 0, Aim(AT_VERSION, 0), Aim(AT_VERSION, 2_000))],
        [do("train", SLOW_STEPS, 5)],
    ],
    [  # an expiry is away while another one removes versions, and files of theirs are named again
        [do("train", TWO_STEPS), do("train", ONE_STEP, 2_000, Aim("overwrite .*clock", 0), Aim("list .*/files", 900))],
        [do("train", SLOW_STEPS, 2_020)],
    ],
    [  # the version that a reader found is gone
        [do("read", 0, 10, Aim("read .*/versions/", 2_000))],
        [do("train", ONE_STEP), do("train", SLOW_STEPS, 10)],
    ],
    [[do("train", TWO_STEPS, 0, Aim(AT_VERSION, 0), Aim(AT_VERSION, 250, "lost"))]],
    [  # an expiry of a training that was followed takes a part of the one that is away before it publishes it
        [do("train", ONE_STEP, 0, Aim("overwrite .*clock", 3_000))],
        [do("train", ONE_STEP, 10, Aim(AT_VERSION, 0), Aim(AT_VERSION, 5_000))],
    ],
    [  # a supervisor is away until the number of its claim is free again
        [do("supervise", ONE_STEP, 0, Aim("create .*supervised", 300))],
        [do("supervise", ONE_STEP), do("supervise", ONE_STEP, 10), do("supervise", SLOW_STEPS, 10)],
    ],
    [[do("supervise", SLOW_STEPS)], [do("supervise", ONE_STEP, 2 * LEASE_S)]],
    [[do("supervise", SLOW_STEPS, 0, Aim(AT_RENEWAL, 200))], [do("supervise", SLOW_STEPS, 100)]],
    [  # a supervisor is away while two others come, and the first of them ends
        [do("supervise", SLOW_STEPS, 0, Aim(AT_RENEWAL, 400))],
        [do("supervise", ONE_STEP, 100), do("supervise", SLOW_STEPS, 100)],
    ],
)


@dataclass(eq=False)
class Holder:
    """A process that asks for the run, or holds it; when it began to ask, and when its claim was created."""

    client: Client
    process: int
    began_s: float
    claimed_s: float = float("inf")
    holds: bool = False

    def is_at_work(self) -> bool:
        """Tell whether it believes that the run is its own."""
        is_there = self.client.process == self.process and not self.client.is_killed
        return self.holds and is_there and not self.client.told_to_stop


@dataclass
class RunHistory(History):
    """A run, and what is known of it."""

    GOOD = (StorageError, CheckpointError, ConfigError)
    PLACE, DECIDES, SCENES = PLACE, DECIDES, SCENES

    world: World
    holders: dict[bytes, Holder] = field(default_factory=dict)
    trainings: list[CheckpointPlace] = field(default_factory=list)
    writers: list[CheckpointPlace] = field(default_factory=list)
    acknowledged: list[tuple[CheckpointPlace, str]] = field(default_factory=list)

    @staticmethod
    def plan(draw: random.Random) -> Plan:
        """Draw what clients do."""
        weights = draw.choice([{"supervise": 1}, {"supervise": 1, "train": 1}, {"supervise": 2, "read": 1}])
        return draw_plan(draw, weights, draw.choice([LEASE_S, KEEP_REMOVED_S]), DECIDES)

    def prepare(self) -> None:
        """Look at checkpoints and claims, and let the supervisors' modules see simulated threads and processes."""
        self.log = PublishedLog(self.world, PLACE, KEEP_REMOVED_S)
        self.world.watchers += [self.watch_claims, self.watch_versions]

    def modules(self, patch: pytest.MonkeyPatch) -> None:
        """Replace what a supervisor knows of its process and machine."""

        def kill(process: int, signal: int) -> None:
            next(each for each in self.world.clients if each is self.world.current.main).told_to_stop = True

        def uname() -> Any:
            return SimpleNamespace(nodename=self.world.current.main.name)

        system = SimpleNamespace(kill=kill, getpid=lambda: self.world.current.process, uname=uname)
        patch.setattr(supervised_run, "os", system)
        patch.setattr(supervised_run, "Path", self._process_path)
        patch.setattr(supervised_run, "threading", SimpleNamespace(Event=self.world.event, Thread=self.world.thread))

    def supervise(self, storage: Storage, number: int) -> None:
        """Hold the run, and train."""
        me = self.world.current
        holder = self.holders[f"process {me.process} on {me.name}".encode()] = Holder(me, me.process, self.world.now_s)
        me.told_to_stop = False
        with supervised_run.claimed(RUN, LEASE_S):
            self._expect_alone(holder)
            holder.holds = True
            try:
                self.train(storage, number)
            finally:
                holder.holds = False

    def train(self, storage: Storage, number: int) -> None:
        """Claim the checkpoints, and write some; who supervises nothing is a rank that its supervisor left behind."""
        me, place = self.world.current, CheckpointPlace(RUN)
        self.trainings.append(place)
        place.claim()
        before = finished(RUN)
        first = before[-1].step + 1 if before else 1
        for step in range(first, first + 1 + number % 3):
            self.world.sleep([1.0, 30.0, 400.0][(number >> 2) % 3])
            if me.told_to_stop:
                return
            data = f"rows of {step} by {len(self.trainings)}".encode()
            with suppress(StorageError):  # of one checkpoint: the training continues
                parts = {"rows": WrittenPart("0" * 32, write_part(place._storage, f"{step_name(step)}-rows", data))}
                place.commit(step, parts, f"state of {step}".encode(), KEEP, None)
                self.acknowledged.append((place, parts["rows"].file.path))

    def read(self, storage: Storage, number: int) -> None:
        """Open the newest checkpoint, and read it a while later."""
        if (found := finished(RUN)) and self._has_to_be_whole(found[-1]):
            self.world.current.patience_s = self.world.now_s + 0.9 * KEEP_REMOVED_S
            self.world.sleep([0.0, 60.0, 0.7 * KEEP_REMOVED_S][number % 3])
            self.log.read(found[-1].files)

    def watch_claims(self, action: str, path: str, data: bytes | None) -> None:
        """See that nobody takes a run whose holder is at work, and nobody goes on after another one took it."""
        if not path.startswith(f"{CLAIMS}/") or data not in self.holders:
            return
        writer, now_s = self.holders[data], self.world.now_s
        others = [each for each in self.holders.values() if each is not writer and each.is_at_work()]
        if action == "create":
            writer.claimed_s = now_s
            if not any(other > path for other in self.world.objects if other.startswith(f"{CLAIMS}/0")):
                self._expect_alone(writer)  # else it looks again, and gives up
        elif path in self.world.objects:
            there = self.world.objects[path].data
            self.world.expect(there in (data, b""), f"{data!r} renews a claim that is {there!r}'s: two hold the run")
            later_s = [each.claimed_s for each in others if writer.claimed_s < each.claimed_s < now_s]
            is_told = later_s and now_s - max(later_s[0], writer.client.disturbed_s) > LEASE_S
            self.world.expect(not is_told, f"{data!r} goes on, though another one took the run long ago")

    def _expect_alone(self, holder: Holder) -> None:
        """See that no other one is at work who was awake since before this one looked at the claims."""
        others = [each for each in self.holders.values() if each is not holder and each.is_at_work()]
        awake = [each for each in others if each.client.disturbed_s < holder.began_s - LEASE_S]
        who = f"process {holder.process} on {holder.client.name}"
        self.world.expect(not awake, f"{who} takes the run, which another one holds")

    def watch_versions(self, action: str, path: str, data: bytes | None) -> None:
        """See that whoever was followed by another writes nothing more, and that the newest checkpoint stays."""
        if action != "create" or not path.startswith(f"{PLACE}/versions/"):
            return
        made, before = self.log.versions[-1], self.log.versions[-2:-1]
        if data is None or made.publication.encode() not in data:
            return  # of a writer that was away, which finds out
        writer = next(each for each in self.trainings if made.publication in each._tried)
        followed = writer in self.writers and writer is not self.writers[-1]
        self.world.expect(not followed, "a training publishes though another one has claimed the run")
        self.writers.append(writer)
        files = before[0].files if before else {}
        steps = sorted(name.partition("/")[0] for name in files)
        kept = {name: path for name, path in files.items() if name.startswith(steps[-1])}
        is_mine = bool(files) and before[0].publication in writer._tried
        if not self._is_acknowledged(kept) and (is_mine or not self._is_whole(kept)):
            return  # it has failed for its training, which went on or was followed by another one
        lost = kept.keys() - made.files.keys()
        self.world.expect(not lost, f"the newest checkpoint has lost {lost}")

    def finish(self) -> None:
        """Look at all that is there at the end."""
        for place, path in self.acknowledged:
            versions = [each for each in self.log.versions if each.publication in place._tried]
            named = any(path in each.files.values() for each in versions)
            self.world.expect(named, f"a checkpoint was acknowledged, and no version names {path}")
        for checkpoint in finished(RUN)[-1:]:
            if self._has_to_be_whole(checkpoint):
                self.log.read(checkpoint.files)

    def _has_to_be_whole(self, newest: Checkpoint) -> bool:
        """Tell whether a checkpoint is not one that has failed for its training, as it lacked a file from the start."""
        files = self.log.versions[newest.files.published.version - 1].files
        own = {name: path for name, path in files.items() if name.startswith(f"{newest.name}/")}
        return self._is_acknowledged(own) or self._is_whole(files)

    def _is_acknowledged(self, files: dict[str, str]) -> bool:
        return bool({*files.values()} & {path for _, path in self.acknowledged})

    def _is_whole(self, files: dict[str, str]) -> bool:
        return all(f"{PLACE}/{path}" in self.world.objects for path in files.values())

    def _process_path(self, path: str) -> Any:
        """Give what `Path` says of a process on the machine of the client that asks."""
        number = re.fullmatch(r"/proc/(\d+)", path)
        is_there = number is not None and int(number[1]) == self.world.current.process
        return SimpleNamespace(exists=lambda: is_there)
