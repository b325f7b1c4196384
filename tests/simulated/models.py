"""Histories of a published model: exports, choices of a version, expiries, and scorers that switch at work."""

import contextlib
import json
import random
import time
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from featurestore.errors import CommitConflictError, StorageError
from featurestore.log import manifest_path, version_of, writer_name
from featurestore.published.versions import append_numbered
from featurestore.storage.storage import Storage
from serving.bundle.files import WrittenFiles, check_file
from serving.bundle.log import (
    BundleIdentity,
    expire,
    known_versions,
    read_version,
    remove_leftovers,
    use,
    version_in_use,
)
from serving.bundle.manifest import BUNDLES, LOG, USE, BundleManifest
from serving.errors import BrokenBundleError, BundleNotFoundError, NotFiniteError
from serving.http import live
from tests.simulated.world import DAY_S, Aim, History, Plan, World, do, draw_plan

PLACE = "w/models"
URL = f"sim://{PLACE}"
GRACE_S = DAY_S
MOST_S = 0.4 * GRACE_S
"""Time that a choice, or the opening of a version, may take."""
WEIGHTS = {"export": 4, "choose": 3, "expire": 3, "serve": 3}
DECIDES = (
    "create .*/use/",
    "create .*/log/",
    "delete .*/(log|bundles)/",
    "(list|read) .*/(log|use)",
    "list .*/bundles",
)
NOT_CHOSEN, SECOND = 2, 4
"""Arguments: of an export; of a choice, the second where there are two or three versions."""
SCENES: tuple[Plan, ...] = (
    [[do("export", NOT_CHOSEN), do("expire", 0, 30)], [do("choose", SECOND, 20, Aim("create .*/use/", 60))]],
    [[do("export", NOT_CHOSEN), do("expire", 0, 20, Aim("delete .*/log/", 60))], [do("choose", SECOND, 40)]],
    [[do("export", NOT_CHOSEN), do("expire", 0, 20, Aim("overwrite .*/leaving/", 60))], [do("choose", SECOND, 40)]],
    [[do("export", NOT_CHOSEN), do("choose", SECOND, 1), do("expire", 0, 1)]],
    [[do("serve", 1)], [do("choose", SECOND, 4)]],
    [[do("export", NOT_CHOSEN, 0, Aim("create .*/log/", 60))], [do("export", NOT_CHOSEN, 20)]],
    [  # an export is away until the number of its version has been given, and removed
        [do("export", NOT_CHOSEN, 0, Aim("create .*/log/", 100))],
        [do("export", NOT_CHOSEN, 10), do("export", NOT_CHOSEN, 10), do("expire", 0, 10)],
    ],
)
NAMES = ("network.pt2", "model.json")


@dataclass(eq=False)
class SimulatedScorer:
    """What a scorer has of a version: the content of its files; a bad one gives no finite scores."""

    world: World
    identity: BundleIdentity
    contents: list[str]
    is_open: bool = True

    def sample(self) -> Any:
        return SimpleNamespace(num_rows=1, slice=lambda first, count: None)

    def score(self, rows: Any) -> str:
        """Return which version this score is of."""
        self.world.expect(self.is_open, f"version {self.identity.version} is scored with after it was closed")
        ids = {each.split()[0] for each in self.contents}
        self.world.expect(len(ids) == 1, f"version {self.identity.version} is mixed of {ids}")
        if "bad" in self.contents[0]:
            raise NotFiniteError("not finite")
        return ids.pop()

    def close(self) -> None:
        self.is_open = False


@dataclass
class ModelHistory(History):
    """A model's address, and what is known of it."""

    GOOD = (StorageError, CommitConflictError, BrokenBundleError, BundleNotFoundError)
    PLACE, MOST_S, DECIDES, SCENES = PLACE, MOST_S, DECIDES, SCENES

    world: World
    ids: dict[int, str] = field(default_factory=dict)
    """By version, the id of its bundle."""
    choices: list[tuple[int, float]] = field(default_factory=list)
    """Versions that were chosen, and when another one was."""
    sure: set[int] = field(default_factory=set)
    """Numbers of acknowledged choices."""
    scorers: list[SimulatedScorer] = field(default_factory=list)

    @staticmethod
    def plan(draw: random.Random) -> Plan:
        """Draw what clients do."""
        return draw_plan(draw, WEIGHTS, GRACE_S, DECIDES)

    def modules(self, patch: pytest.MonkeyPatch) -> None:
        """Let a scorer's work in threads be done at once."""

        async def to_thread(work: Any, *arguments: Any) -> Any:
            return work(*arguments)

        patch.setattr(live, "asyncio", SimpleNamespace(to_thread=to_thread))

    def prepare(self) -> None:
        """Publish two versions, and choose the first."""
        self.world.watchers.append(self.watch)
        for number in (1, 2):
            self.export(Storage(URL), 2 * number)
        self.choose(Storage(URL), 1)

    def export(self, storage: Storage, number: int) -> None:
        """Publish a version as `export_model` does; one in eight is bad; one in two is chosen."""
        remove_leftovers(storage)
        bundle_id = uuid.uuid4().hex
        files = WrittenFiles(storage, f"{BUNDLES}/{bundle_id}")
        for name in NAMES:
            files.write(name, f"{bundle_id} {name} {'bad' if number % 8 == 7 else 'good'}".encode())
        draft = BundleManifest(
            version=1, bundle_id=bundle_id, time_s=time.time(), writer=writer_name(), run="r", checkpoint="c",
            checkpoint_digest="d", id_dtype="float32", rows=(), tables=(), vectors=(), missing="zeros",
            missing_in_training="zeros", metrics={}, files=tuple(files.files),
        )  # fmt: skip
        made = append_numbered(storage, LOG, lambda version: draft.model_copy(update={"version": version}))
        self.world.expect(self.ids.get(made.version) == bundle_id, f"version {made.version} is two versions")
        if number % 2:
            self.choose(storage, made.version)

    def choose(self, storage: Storage, number: int) -> None:
        """Choose a late version."""
        known = known_versions(storage)
        version = number if number in known[:1] else known[-1 - number % min(3, len(known))]
        choice = use(storage, version)
        self.sure.add(choice.choice)
        if choice.choice == len(self.choices):
            self.world.expect(self._is_whole(version), f"version {version} was put in use, and is not whole")

    def expire(self, storage: Storage, number: int) -> None:
        """Remove what nobody serves."""
        expire(storage, keep_last=1, keep_days=0, grace_days=GRACE_S / DAY_S)

    def serve(self, storage: Storage, number: int) -> None:
        """Serve the version in use for some time, and score bodies of several pieces meanwhile."""
        source = live.BundleSource(SimpleNamespace(model=URL, cache_dir=None))
        source.open = self._open
        nothing = SimpleNamespace(labels=lambda name: SimpleNamespace(inc=lambda: None))
        metrics = SimpleNamespace(record_age=lambda _: None, record_model=lambda _, switched: None, switches=nothing)
        model = live.LiveModel(source, metrics, 30.0)
        _done(model.start())
        bodies = self.world.thread(lambda: self._score_bodies(model, number), daemon=True)
        bodies.start()
        for _ in range(2 + number % 3):
            self.world.sleep([5.0, 60.0, 0.3 * GRACE_S][(number >> 2) % 3])
            self.world.current.patience_s = self.world.now_s + MOST_S
            _done(model.poll_once())
        bodies.join()
        model.close()

    def finish(self) -> None:
        """Look at all that is there at the end; a scorer that begins serves the version in use."""
        newest = len(self.choices)
        if newest in self.sure:
            version = self.choices[-1][0]
            self.world.expect(version_in_use(Storage(URL)) == version, f"version {version} is not in use")
            self.world.expect(self._is_whole(version), f"version {version} is in use, and is not whole")

    def watch(self, action: str, path: str, data: bytes | None) -> None:
        """Note versions and choices, and see that nothing is removed that a scorer may open."""
        folder, _, name = path.removeprefix(f"{PLACE}/").rpartition("/")
        number = version_of(name) or 0
        if folder == LOG and data is not None:
            bundle_id = json.loads(data)["bundle_id"]
            if number > max(self.ids, default=0):  # else of an export that was away, or put back by an expiry
                self.ids[number] = bundle_id
                self.world.expect(self._has_files(number), f"version {number} is published without its files")
        elif folder == USE and action == "create" and data is not None:
            if self.choices:
                self.choices[-1] = (self.choices[-1][0], self.world.now_s)
            self.choices.append((json.loads(data)["version"], float("inf")))
        elif action != "delete":
            return  # of a file that was written before, as its answer was lost
        elif folder == LOG:
            self.world.expect(number < max(self.ids), "the newest version is removed, and its number free")
        elif folder.startswith(f"{BUNDLES}/"):
            served = [v for v in self._served() if self.ids[v] == folder.removeprefix(f"{BUNDLES}/")]
            self.world.expect(not served, f"files of version {served} are removed, which scorers may open")
            newest = self.ids.get(max(self.ids, default=0))
            self.world.expect(folder != f"{BUNDLES}/{newest}", "files of the newest version are removed")

    def _served(self) -> list[int]:
        """Find the versions that were surely chosen, and in use within the grace time."""
        chosen = enumerate(self.choices, start=1)
        return [v for number, (v, end_s) in chosen if number in self.sure and self.world.now_s - end_s < 0.99 * GRACE_S]

    def _has_files(self, version: int) -> bool:
        return all(f"{PLACE}/{BUNDLES}/{self.ids[version]}/{name}" in self.world.objects for name in NAMES)

    def _is_whole(self, version: int) -> bool:
        return self._has_files(version) and f"{PLACE}/{manifest_path(version, LOG)}" in self.world.objects

    def _open(self, identity: BundleIdentity, current: Any) -> Any:
        storage = Storage(URL)
        manifest = read_version(storage, identity.version)
        for file in manifest.files:
            check_file(storage, f"{manifest.folder}/{file.name}", file, verify=True)
        contents = [storage.read_bytes(f"{manifest.folder}/{name}").decode() for name in NAMES]
        self.scorers.append(SimulatedScorer(self.world, identity, contents))
        return self.scorers[-1]

    def _score_bodies(self, model: live.LiveModel, number: int) -> None:
        for _ in range(2):
            with model.held() as scorer:
                versions = set()
                for _ in range(2 + number % 2):
                    versions.add(scorer.score(None))
                    self.world.sleep([1.0, 50.0, 0.2 * GRACE_S][number % 3])
                self.world.expect(len(versions) == 1, f"one body was scored with {versions}")
            now = model.model.identity.version
            left = [each for each in self.scorers if each.is_open and each is scorer and each is not model.model]
            self.world.expect(not left, f"version {scorer.identity.version} is open still, and {now} serves")


def _done(work: Coroutine[Any, Any, Any]) -> None:
    """Run a coroutine that waits for nothing to its end."""
    with contextlib.suppress(StopIteration):
        work.send(None)
        raise AssertionError("it waits")
