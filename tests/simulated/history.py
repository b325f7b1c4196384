"""What all histories have: steps that clients do, numbered files that decide what holds, and what may not go.

A step is a text: after which time, what, and what befalls its requests, one after another:

    5s put bc | stalled 60s create .*/log/ | lost 90s delete .*/log/
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from featurestore.errors import CorruptFileError, StorageError, UserError
from featurestore.log import manifest_path, version_of
from featurestore.storage.storage import Storage
from tests.simulated.objects import ObjectStore
from tests.simulated.world import Client, Killed, World, seconds


@dataclass
class Entry:
    """A numbered file as it was created: what it says, and up to when it was the newest."""

    content: dict[str, Any]
    end_s: float = float("inf")


class History:
    """One history: the product at work, and what is known of it. A step is a method, its words are the arguments."""

    PLACE: ClassVar[str]
    LOG: ClassVar[str]
    """The folder of its versions."""
    SPAN_S: ClassVar[float]
    """How long what is removed is kept for those who still use it."""
    MOST_S: ClassVar[float] = float("inf")
    """Time that a step may take."""

    def __init__(self, world: World) -> None:
        self.world, self.store = world, ObjectStore(world, self.watch)
        self.logs: dict[str, list[Entry]] = defaultdict(list)
        """By folder, what was created as its numbers 1, 2, … What counts is the order in which that was done."""
        self.strays: dict[str, dict[str, Any]] = {}
        """By path, what a writer that was away created again as a number that had been removed; it may find out."""
        self.first: dict[str, bytes] = {}
        """By path, the first bytes that were written there."""
        self.creators: list[Client] = []
        """Who has created a file, in this order."""
        self.acknowledged: list[tuple[str, int, str, str]] = []
        """Folders and numbers that the product said it created, and a field by which they are known, with its value."""
        self.unique = itertools.count(1)
        self.damaged: set[int] = set()
        """Versions whose manifest a step has damaged: what they said is lost, or committed again."""
        self.may_be_corrupt = False
        """Whether a step has taken away, or damaged, what others may be reading."""

    def prepare(self, patch: pytest.MonkeyPatch) -> None:
        """Make what clients find, and replace what the product knows of its process and machine."""

    def opened(self) -> Any:
        """Open what steps work on."""
        return Storage(f"sim://{self.PLACE}")

    @property
    def newest(self) -> int:
        """The newest version."""
        return len(self.logs[self.LOG])

    def files(self, version: int) -> Collection[str]:
        """Return the paths of a version's files."""
        raise NotImplementedError

    def kept(self) -> set[int]:
        """Return the versions that have to stay."""
        return {self.newest}

    def held(self) -> Collection[int]:
        """Return the versions whose files have to stay."""
        return ()

    def needed(self) -> set[str]:
        """Return the paths that have to stay as they are now."""
        manifests = {manifest_path(version, self.LOG) for version in self.kept()}
        return manifests.union(*map(self.files, {*self.kept(), *self.held()}))

    def created(self, content: dict[str, Any]) -> None:
        """Look at the newest version, when it is created."""

    def finish(self) -> None:
        """Look at all that is there at the end: each acknowledged file counts once, under its number."""
        for folder, number, name, value in self.acknowledged:
            damaged = self.damaged if folder == self.LOG else set()
            places = {place for place, each in enumerate(self.logs[folder], start=1) if each.content[name] == value}
            is_once = places - damaged == {number} - damaged
            self.world.expect(is_once, f"{folder} {number} was acknowledged, and {value} is at {sorted(places)}")

    def work(self, steps: Sequence[str]) -> None:
        """Do steps, one after another."""
        for step in steps:
            self.perform(step)

    def perform(self, step: str) -> None:
        """Do a step, as a process of its own; what only reads fails only where a request of its own has failed."""
        world, me = self.world, self.world.current
        words, *aims = step.split(" | ")
        pause, name, *arguments = words.split()
        me.process, me.is_killed, me.aims, num_failed = me.process + 1, False, (), me.num_failed
        try:
            world.sleep(seconds(pause))
            me.patience_s, me.aims = world.now_s + self.MOST_S, tuple(aims)
            getattr(self, name)(self.opened(), *arguments)
        except Killed:
            if world.failure is not None:
                raise
        except UserError as error:
            world.expect(self.may_be_corrupt or not isinstance(error, CorruptFileError), f"{step}: {error}")
            may_fail = name != "read" or me.num_failed > num_failed or not isinstance(error, StorageError)
            world.expect(may_fail, f"{name} fails, though all of its requests were answered: {error}")

    def watch(self, verb: str, path: str, data: bytes | None) -> None:
        """Note what is written; see that nothing changes that has to stay, and that no numbered file is replaced."""
        path = path.removeprefix(f"{self.PLACE}/")
        folder, _, name = path.rpartition("/")
        number = version_of(name)
        if self.is_there(path) and data != self.first[path]:
            is_free = path not in self.needed() and (data is None or number is None)
            self.world.expect(is_free, f"{verb} of {path}, which has to stay as it is")
        if data is None:
            return
        self.first.setdefault(path, data)
        if verb == "create":
            self.creators.append(self.world.current.main)
        if number == len(self.logs[folder]) + 1:
            for before in self.logs[folder][-1:]:
                before.end_s = self.world.now_s
            self.logs[folder].append(Entry(json.loads(data)))
            if folder == self.LOG:
                self.created(self.logs[folder][-1].content)
        elif number is not None:
            self.strays[path] = json.loads(data)

    def is_there(self, path: str) -> bool:
        """Tell whether an object is there as it was first written."""
        stored = self.store.objects.get(f"{self.PLACE}/{path}")
        return stored is not None and stored.data == self.first[path]
