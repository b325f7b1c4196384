"""Histories of a published model: exports, choices of a version, expiries, and scorers that switch at work."""

import contextlib
import time
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pyarrow as pa
import pytest

from featurestore.log import manifest_path, writer_name
from featurestore.storage.storage import Storage
from serving.bundle import log
from serving.bundle.files import WrittenFiles, check_file
from serving.bundle.log import BundleIdentity
from serving.bundle.manifest import BUNDLES, LOG, USE, BundleManifest
from serving.errors import NotFiniteError
from serving.http import live
from tests.simulated.history import History
from tests.simulated.world import World, seconds

URL = "sim://w/models"
NAMES = ("network.pt2", "model.json")


@dataclass(eq=False)
class SimulatedScorer:
    """What a scorer has of a version: the content of its files; a bad one gives no finite scores."""

    world: World
    identity: BundleIdentity
    contents: list[str]
    is_open: bool = True

    def sample(self) -> Any:
        return pa.table({"row": [1]})

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


class ModelHistory(History):
    """A model's address, and what is known of it."""

    PLACE, LOG = "w/models", LOG
    SPAN_S, MOST_S = seconds("1d"), seconds("0.4d")

    def prepare(self, patch: pytest.MonkeyPatch) -> None:
        """Publish two versions, and choose the first; let a scorer's work in threads be done at once."""
        at_once = AsyncMock(side_effect=lambda work, *arguments: work(*arguments))
        patch.setattr(live, "asyncio", SimpleNamespace(to_thread=at_once))
        for when in ("use", "keep"):
            self.export(self.opened(), "good", when)

    def export(self, storage: Storage, state: str, when: str) -> None:
        """Publish a version as `export_model` does."""
        log.remove_leftovers(storage)
        bundle_id = uuid.uuid4().hex
        files = WrittenFiles(storage, f"{BUNDLES}/{bundle_id}")
        for name in NAMES:
            files.write(name, f"{bundle_id} {name} {state}".encode())
        draft = BundleManifest(
            version=1, bundle_id=bundle_id, time_s=time.time(), writer=writer_name(), run="r", checkpoint="c",
            checkpoint_digest="d", rows=(), tables=(), vectors=(), missing="zeros",
            missing_in_training="zeros", metrics={}, files=tuple(files.files),
        )  # fmt: skip
        made = log.publish(storage, draft)
        self.acknowledged.append((LOG, made.version, "bundle_id", bundle_id))
        if when == "use":
            self.choose(storage, "0")

    def choose(self, storage: Storage, back: str) -> None:
        """Choose the newest version, or one before it."""
        known = log.known_versions(storage)
        made = log.use(storage, known[-1 - int(back) % len(known)])
        self.acknowledged.append((USE, made.choice, "nonce", made.nonce))
        if made.choice == len(self.logs[USE]):
            self.check_whole(made.version)

    def expire(self, storage: Storage) -> None:
        """Remove what nobody serves."""
        log.expire(storage, keep_last=1, keep_days=0, grace_days=1)

    def serve(self, storage: Storage, num_polls: str, poll: str, num_pieces: str, piece: str) -> None:
        """Serve the version in use for some time, and score bodies of several pieces meanwhile."""
        source = live.BundleSource(SimpleNamespace(model=URL, cache_dir=None))
        source.open = self._open
        model = live.LiveModel(source, MagicMock(), 30.0)
        _done(model.start())
        bodies = self.world.thread(lambda: self._score_bodies(model, int(num_pieces), seconds(piece)), daemon=True)
        bodies.start()
        for _ in range(int(num_polls)):
            self.world.sleep(seconds(poll))
            self.world.current.patience_s = self.world.now_s + self.MOST_S
            _done(model.poll_once())
        bodies.join()
        model.close()

    def files(self, version: int) -> list[str]:
        """Return the paths of a version's files."""
        return [f"{BUNDLES}/{self.logs[LOG][version - 1].content['bundle_id']}/{name}" for name in NAMES]

    def chosen(self, since_s: float) -> list[int]:
        """Return the versions that were surely chosen, and in use then or later."""
        sure = {number for folder, number, _, _ in self.acknowledged if folder == USE}
        choices = enumerate(self.logs[USE], start=1)
        return [each.content["version"] for number, each in choices if number in sure and each.end_s > since_s]

    def held(self) -> list[int]:
        """Return the versions that scorers may open."""
        return self.chosen(self.world.now_s - 0.99 * self.SPAN_S)

    def created(self, content: dict[str, Any]) -> None:
        """See that a version has its files when it is published."""
        is_whole = all(map(self.is_there, self.files(self.newest)))
        self.world.expect(is_whole, f"version {self.newest} is published without its files")

    def finish(self) -> None:
        """Look at all that is there at the end; a scorer that begins serves the version in use."""
        super().finish()
        for version in self.chosen(self.world.now_s):
            self.world.expect(log.version_in_use(self.opened()) == version, f"version {version} is not in use")
            self.check_whole(version)

    def check_whole(self, version: int) -> None:
        """See that a version that was put in use is there."""
        is_whole = all(map(self.is_there, (*self.files(version), manifest_path(version, LOG))))
        self.world.expect(is_whole, f"version {version} is in use, and is not whole")

    def _open(self, identity: BundleIdentity, current: Any) -> Any:
        storage = self.opened()
        manifest = log.read_version(storage, identity.version)
        for file in manifest.files:
            check_file(storage, f"{manifest.folder}/{file.name}", file, verify=True)
        contents = [storage.read_bytes(f"{manifest.folder}/{name}").decode() for name in NAMES]
        return SimulatedScorer(self.world, identity, contents)

    def _score_bodies(self, model: live.LiveModel, num_pieces: int, piece_s: float) -> None:
        for _ in range(2):
            with model.held() as scorer:
                versions = set()
                for _ in range(num_pieces):
                    versions.add(scorer.score(None))
                    self.world.sleep(piece_s)
                self.world.expect(len(versions) == 1, f"one body was scored with {versions}")
            is_closed = scorer is model.model or not scorer.is_open
            self.world.expect(is_closed, f"version {scorer.identity.version} is open still, and another one serves")


def _done(work: Coroutine[Any, Any, Any]) -> None:
    """Run a coroutine that waits for nothing to its end."""
    with contextlib.suppress(StopIteration):
        work.send(None)
        raise AssertionError("it waits")
