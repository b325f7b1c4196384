"""Histories of a run: supervisors that hold it one after another, and their trainings, which publish checkpoints."""

import random
import re
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from featurestore.errors import StorageError
from featurestore.published.paths import FarPath
from featurestore.published.versions import write_part
from tests.simulated.published import PublishedLog
from tests.simulated.world import Client, Operation, Plan, World, draw_plan
from trainer import supervise as supervised_run
from trainer.errors import CheckpointError, ConfigError
from trainer.runs.folder import finished, step_name
from trainer.runs.saving import KEEP_REMOVED_S, CheckpointPlace, WrittenPart

RUN = FarPath("sim://w/run")
CLAIMS, PLACE = "w/.run.supervised", "w/run/checkpoints"
LEASE_S = supervised_run.LEASE_S
KEEP = 2


@dataclass(eq=False)
class Holder:
    """A process that asks for the run, or holds it: when it began to ask, and the times of its renewals."""

    client: Client
    process: int
    began_s: float
    renewed_s: list[float] = field(default_factory=list)
    holds: bool = False

    def is_at_work(self) -> bool:
        """Tell whether it believes that the run is its own."""
        return self.holds and self.client.process == self.process and not self.client.told_to_stop

    def was_silent(self, since_s: float, now_s: float) -> bool:
        """Tell whether its lease ran out at some time after `since_s`."""
        times_s = [*self.renewed_s, now_s]
        return any(b - a >= LEASE_S - 1 and b >= since_s for a, b in pairwise(times_s))


@dataclass
class RunHistory:
    """A run, and what is known of it."""

    world: World
    holders: dict[bytes, Holder] = field(default_factory=dict)
    trainings: list[CheckpointPlace] = field(default_factory=list)
    writers: list[CheckpointPlace] = field(default_factory=list)
    acknowledged: list[tuple[CheckpointPlace, str]] = field(default_factory=list)

    @staticmethod
    def plan(draw: random.Random) -> Plan:
        """Draw what clients do."""
        weights = draw.choice([{"supervise": 1}, {"supervise": 1, "train": 1}, {"supervise": 2, "read": 1}])
        return draw_plan(draw, weights, draw.choice([LEASE_S, KEEP_REMOVED_S]))

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

    def perform(self, operation: Operation) -> None:
        """Do an operation; of errors those are good that the product names for what may be."""
        with suppress(StorageError, CheckpointError, ConfigError):
            getattr(self, operation.name)(operation.argument)

    def supervise(self, number: int) -> None:
        """Hold the run, and train."""
        me = self.world.current
        holder = self.holders[f"process {me.process} on {me.name}".encode()] = Holder(me, me.process, self.world.now_s)
        me.told_to_stop = False
        with supervised_run.claimed(RUN, LEASE_S):
            holder.holds = True
            try:
                self.train(number)
            finally:
                holder.holds = False

    def train(self, number: int) -> None:
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
            parts = {"rows": WrittenPart("0" * 32, write_part(place._storage, f"{step_name(step)}-rows", data))}
            place.commit(step, parts, f"state of {step}".encode(), KEEP, None)
            self.acknowledged.append((place, parts["rows"].file.path))

    def read(self, number: int) -> None:
        """Open the newest checkpoint, and read it a while later."""
        if found := finished(RUN):
            self.world.current.patience_s = self.world.now_s + 0.9 * KEEP_REMOVED_S
            self.world.sleep([0.0, 60.0, 0.7 * KEEP_REMOVED_S][number % 3])
            self.log.read(found[-1].files)
            self.world.current.patience_s = float("inf")

    def watch_claims(self, action: str, path: str, data: bytes | None) -> None:
        """See that nobody takes a run whose holder is at work, and nobody writes into another's claim."""
        if not path.startswith(f"{CLAIMS}/") or data not in self.holders:
            return
        taker, now_s = self.holders[data], self.world.now_s
        if action == "create":
            others = [each for each in self.holders.values() if each is not taker and each.is_at_work()]
            awake = [each for each in others if not each.was_silent(taker.began_s, now_s)]
            self.world.expect(not awake, f"{data!r} takes the run, which another one holds")
        elif path in self.world.objects:
            there = self.world.objects[path].data
            self.world.expect(there in (data, b""), f"{data!r} renews a claim that is {there!r}'s: two hold the run")
        taker.renewed_s.append(now_s)

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
        steps = sorted(name.partition("/")[0] for name in before[0].files) if before else []
        kept = [name for name in before[0].files if name.startswith(steps[-1])] if steps else []
        lost = [name for name in kept if name not in made.files]
        self.world.expect(not lost, f"the newest checkpoint has lost {lost}")

    def finish(self) -> None:
        """Look at all that is there at the end."""
        for place, path in self.acknowledged:
            versions = [each for each in self.log.versions if each.publication in place._tried]
            named = any(path in each.files.values() for each in versions)
            self.world.expect(named, f"a checkpoint was acknowledged, and no version names {path}")
        for checkpoint in finished(RUN)[-1:]:
            self.log.read(checkpoint.files)

    def _process_path(self, path: str) -> Any:
        """Give what `Path` says of a process on the machine of the client that asks."""
        number = re.fullmatch(r"/proc/(\d+)", path)
        is_there = number is not None and int(number[1]) == self.world.current.process
        return SimpleNamespace(exists=lambda: is_there)
