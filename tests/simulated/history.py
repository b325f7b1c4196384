"""What all histories have: steps that clients do, numbered files that decide what holds, and what may not go.

A step is a text: after which time, what, and what befalls its requests, one after another:

    5s put bc | stalled 60s create .*/log/ | lost 90s delete .*/log/
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from featurestore.errors import CorruptFileError, UserError
from featurestore.log import manifest_path, version_of
from featurestore.storage.storage import Storage
from tests.simulated.world import ASLEEP, Killed, ObjectStore, World, seconds

IDS = ("nonce", "publication", "bundle_id", "commit_id")
"""Fields by the first of which the content of a numbered file is like no other's."""


@dataclass
class Entry:
    """A numbered file as it was created, and by which client and process."""

    content: dict[str, Any]
    by: tuple[str, int]
    files: frozenset[str] = frozenset()
    """What a version needs; nothing where a writer was away for so long that some of it was gone before."""
    is_whole: bool = True
    end_s: float = float("inf")
    """Up to when it was the newest."""
    is_acknowledged: bool = False


class History:
    """One history: the product at work, and what is known of it. A step is a method, its words are the arguments."""

    PLACE: ClassVar[str]
    LOG: ClassVar[str]
    """The folder of its versions."""
    SPAN_S: ClassVar[float]
    """How long what is removed is kept for those who still use it."""
    MOST_S: ClassVar[float]
    """Time that a step, or what it says of itself, may take."""

    def __init__(self, world: World, plan: str) -> None:
        """`plan`: all steps, as some of them are allowed to harm others."""
        self.world, self.plan, self.store = world, plan, ObjectStore(world, self.watch)
        self.logs: dict[str, list[Entry]] = defaultdict(list)
        """By folder, what was created as its numbers 1, 2, … What counts is the order in which that was done."""
        self.unique = itertools.count(1)

    def prepare(self, patch: pytest.MonkeyPatch) -> None:
        """Make what clients find, and replace what the product knows of its process and machine."""

    def finish(self) -> None:
        """Look at all that is there at the end."""

    def opened(self) -> Any:
        """Open what steps work on."""
        return Storage(f"sim://{self.PLACE}")

    @property
    def log(self) -> list[Entry]:
        """The versions, of which the first is 1."""
        return self.logs[self.LOG]

    def files_of(self, content: dict[str, Any]) -> Collection[str]:
        """Return the paths of the files that a version needs."""
        raise NotImplementedError

    def kept(self) -> set[int]:
        """Return the versions that have to stay."""
        return {len(self.log)}

    def needed(self) -> set[str]:
        """Return the paths that have to stay: versions that are kept, and the files of all that are there."""
        there = [v for v in range(1, len(self.log) + 1) if self.is_there(manifest_path(v, self.LOG))]
        manifests = {manifest_path(version, self.LOG) for version in self.kept()}
        return manifests.union(*(self.log[version - 1].files for version in there))

    def created(self, entry: Entry) -> None:
        """See that the newest version, when it is created, has its files, unless a writer has slept for too long."""
        files = frozenset(self.files_of(entry.content))
        entry.is_whole = all(map(self.is_there, files))
        self.world.expect(entry.is_whole or ASLEEP in self.plan, f"version {len(self.log)} is made without its files")
        entry.files = files if entry.is_whole else frozenset()

    def acknowledge(self, folder: str, number: int, **fields: str) -> None:
        """See that a numbered file, of which the product said that it made it, has these fields, and what it needs."""
        entry = self.logs[folder][number - 1]
        is_same = entry.is_whole and fields.items() <= entry.content.items()
        self.world.expect(is_same, f"{folder} {number} was acknowledged to have {fields}, and is {entry}")
        entry.is_acknowledged = True
        gone = [path for path in self.needed() if not self.is_there(path)]
        self.world.expect(not gone, f"{folder} {number} was acknowledged, and {gone} has gone")

    def perform(self, step: str) -> None:
        """Do a step, as a process of its own.

        Beside purges and repairs it may fail. Else a reader fails only where a request of its own has, and nothing is
        corrupt but for who sleeps too long."""
        world, me = self.world, self.world.current
        words, *aims = step.split(" | ")
        pause, name, *arguments = words.split()
        me.process, num_failed = me.process + 1, me.num_failed
        try:
            world.sleep(seconds(pause))
            me.aims = tuple(aims)
            self.begin()
            getattr(self, name)(self.opened(), *arguments)
        except Killed:
            pass
        except UserError as error:
            is_harmed, is_late = "purge" in self.plan or "mend" in self.plan, ASLEEP in self.plan
            is_excused = is_late or not isinstance(error, CorruptFileError)
            may_fail = me.num_failed > num_failed if name == "read" else is_excused
            world.expect(is_harmed or may_fail, f"{step} fails without a reason: {error}")

    def begin(self, for_s: float = 0.0) -> None:
        """Give the running client the time, beside that which it waits by itself, to end what it begins now."""
        self.world.current.patience_s = self.world.now_s + self.MOST_S - for_s

    def watch(self, verb: str, path: str, data: bytes | None) -> None:
        """See that nothing changes that has to stay, and no numbered file is replaced, or made twice; note new ones."""
        world, path = self.world, path.removeprefix(f"{self.PLACE}/")
        folder, _, name = path.rpartition("/")
        number, log = version_of(name), self.logs[folder]
        if self.is_there(path) and data != self.store.objects[f"{self.PLACE}/{path}"].data:
            is_free = path not in self.needed() and (data is None or number is None)
            world.expect(is_free, f"{verb} of {path}, which has to stay as it is")
        if data is not None and number == len(log) + 1:
            content = json.loads(data)
            known_by = next((name for name in IDS if name in content), "")
            is_new = all(each.content[known_by] != content[known_by] for each in log) or "mend" in self.plan
            world.expect(is_new, f"what {path} has is there twice: {content}")
            for before in log[-1:]:
                before.end_s = world.now_s
            log.append(Entry(content, (world.current.name, world.current.process)))
            if folder == self.LOG:
                self.created(log[-1])

    def is_there(self, path: str) -> bool:
        """Tell whether an object is there as it was first written."""
        place = f"{self.PLACE}/{path}"
        return place in self.store.objects and self.store.objects[place] is self.store.first[place]
