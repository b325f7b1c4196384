"""What all histories have: steps that clients do, numbered files that decide what holds, and what may not go.

A step is a text: after which time, what, and what befalls its requests, one after another:

    5s put bc | stalled 60s create .*/log/ | lost 90s delete .*/log/
"""

import contextlib
import gc
import itertools
import json
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Self

from featurestore.errors import CorruptFileError, UserError
from featurestore.log import manifest_path, version_of
from featurestore.spec import Sealed, seal
from featurestore.storage.storage import Storage
from serving.bundle.manifest import BUNDLES
from tests.simulated.world import ASLEEP, STEPS, Clients, Killed, ObjectStore, World, seconds, simulated


@dataclass
class Entry:
    """A numbered file as it was created, and by which client and process."""

    data: bytes
    content: dict[str, Any]
    by: tuple[str, int]
    named: dict[str, str]
    """The paths of the files that it needs, by their names."""
    is_whole: bool
    """Whether they were there; else a writer was away for so long that some had gone before."""
    end_s: float = float("inf")
    """Up to when it was the newest."""
    opened_s: float = float("-inf")
    """When it was opened last by who reads it, and may do so for most of the time that removed files are kept for."""
    is_acknowledged: bool = False


class History:
    """One history: the product at work, and what is known of it. A step is a method, its words are the arguments."""

    def __init__(self, world: World, clients: Clients) -> None:
        self.world, self.clients, self.store = world, clients, ObjectStore(world, self.watch)
        self.plan = str(clients)
        """All steps, as some of them are allowed to harm others."""
        self.known = STEPS[type(self).__name__]
        self.place, self.folder = self.known["place"], self.known["folder"]
        self.span_s, self.most_s, self.kept_s = (seconds(self.known[name]) for name in ("span", "most", "kept"))
        self.logs: dict[str, list[Entry]] = defaultdict(list)
        """By folder, what was created as its numbers 1, 2, … What counts is the order in which that was done."""
        self.log = self.logs[self.folder]
        """The versions."""
        self.unique = itertools.count(1)

    def play(self) -> Self:
        """Let clients perform their steps, in a world whose `failure` says why the history failed."""
        gc.disable()  # what it would collect may have requests to make
        with contextlib.suppress(Killed), self.world.failing(), simulated(self.world, self.store):
            for step in self.known["begins"]:
                self.perform(step)
            self.world.play(self.clients, self.perform)
            for step in self.known["ends"]:
                self.perform(step)
        gc.enable()
        return self

    def perform(self, step: str) -> None:
        """Do a step, as a process of its own; what it returns the product said that it made.

        Beside purges and repairs it may fail. Else a reader fails only where a request of its own has, and nothing is
        corrupt but for who sleeps too long."""
        me = self.world.current
        words, *aims = step.split(" | ")
        pause, name, *arguments = words.split()
        me.process, me.num_failed = me.process + 1, 0
        try:
            self.world.sleep(seconds(pause))
            me.aims = aims
            self.begin()
            if made := getattr(self, name)(self.opened(), *arguments):
                self.acknowledge(made)
        except Killed:
            pass
        except UserError as error:
            is_harmed, is_corrupt = "purge" in self.plan or "mend" in self.plan, isinstance(error, CorruptFileError)
            may_fail = me.num_failed > 0 if name == "read" else not is_corrupt or ASLEEP in self.plan
            assert (is_harmed or may_fail) and me is not self.world.calm, f"{step} fails without a reason: {error}"

    def opened(self) -> Any:
        """Open what steps work on."""
        return Storage(f"sim://{self.place}")

    def begin(self, for_s: float = 0.0) -> None:
        """Give the running client the time, beside that which it waits by itself, to end what it begins now."""
        self.world.current.patience_s = self.world.now_s + self.most_s - for_s

    def acknowledge(self, made: Sealed) -> Entry:
        """See that what the product said that it made for this step is there once, and has all that it needs."""
        data, by = seal(made), (self.world.current.name, self.world.current.process)  # who expires it makes a copy
        found = [each for log in self.logs.values() for each in log if (each.data, each.by) == (data, by)]
        is_there = [each.is_whole for each in found] == [True]
        assert is_there, f"what was acknowledged is there {len(found)} times, or lacks files: {made}"
        found[0].is_acknowledged = True
        gone = [path for path in self.needed() if not self.is_there(path)]
        assert not gone, f"{made} was acknowledged, and {gone} has gone"
        return found[0]

    def watch(self, verb: str, path: str, data: bytes | None) -> None:
        """See that nothing changes that has to stay, and no numbered file is replaced, or made twice; note new ones.

        Those have their files, unless a writer has slept for too long."""
        path = path.removeprefix(f"{self.place}/")
        folder, _, name = path.rpartition("/")
        number, log = version_of(name), self.logs[folder]
        if self.is_there(path) and data != self.store.objects[f"{self.place}/{path}"].data:
            is_free = path not in self.needed() and (data is None or number is None)
            assert is_free, f"{verb} of {path}, which has to stay as it is"
        if data is not None and number == len(log) + 1:
            content, me = json.loads(data), self.world.current
            known_by = next(name for name in ("nonce", "publication", "bundle_id", "commit_id") if name in content)
            is_new = all(each.content[known_by] != content[known_by] for each in log) or "mend" in self.plan
            assert is_new, f"what {path} has is there twice: {content}"
            named = _named(content)
            is_whole = all(map(self.is_there, named.values()))
            assert is_whole or ASLEEP in self.plan, f"{path} is made without its files"
            for before in log[-1:]:
                before.end_s = self.world.now_s
            log.append(Entry(data, content, (me.name, me.process), named, is_whole))
            if folder == self.folder:
                self.created(log[-1])

    def created(self, entry: Entry) -> None:
        """Look at a new version."""

    def kept(self) -> set[int]:
        """Return the versions that have to stay: the newest, and those that were it of late."""
        since_s = self.world.now_s - self.kept_s
        return {version for version, each in enumerate(self.log, start=1) if each.end_s > since_s}

    def needed(self) -> set[str]:
        """Return the paths that have to stay: versions that are kept, and files of all that are there, or are read."""
        paths = {manifest_path(version, self.folder): each for version, each in enumerate(self.log, start=1)}
        since_s = self.world.now_s - 0.8 * self.span_s
        used = [each for path, each in paths.items() if self.is_there(path) or each.opened_s > since_s]
        kept = {manifest_path(version, self.folder) for version in self.kept()}
        return kept.union(*(each.named.values() for each in used if each.is_whole))

    def is_there(self, path: str) -> bool:
        """Tell whether an object is there as it was first written."""
        place = f"{self.place}/{path}"
        return place in self.store.objects and self.store.objects[place] is self.store.first[place]


def _named(content: dict[str, Any]) -> dict[str, str]:
    """Return the paths of the files that a numbered file names, by their names."""
    if "bundle_id" in content:
        return {each["name"]: f"{BUNDLES}/{content['bundle_id']}/{each['name']}" for each in content["files"]}
    in_shards = itertools.chain(*content.get("shards", {}).values())
    files = content.get("files", {each["path"]: each for each in in_shards})
    return {name: each["path"] for name, each in files.items()}
