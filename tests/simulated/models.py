"""Histories of a published model: exports, choices of a version, expiries, and scorers that switch at work."""

import contextlib
import time
import uuid
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pyarrow as pa
import pytest

from featurestore.log import writer_name
from featurestore.storage.storage import Storage
from serving.bundle import log
from serving.bundle.files import WrittenFiles, check_file
from serving.bundle.log import BundleIdentity
from serving.bundle.manifest import BUNDLES, LOG, USE, BundleManifest
from serving.errors import NotFiniteError
from serving.http import live
from tests.simulated.history import History
from tests.simulated.world import seconds

URL = "sim://w/models"
NAMES = ("network.pt2", "model.json")


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
        self.acknowledge(LOG, made.version, bundle_id=bundle_id)
        if when == "use":
            self.choose(storage, "0")

    def choose(self, storage: Storage, back: str) -> None:
        """Choose the newest version, or one before it."""
        known = log.known_versions(storage)
        made = log.use(storage, known[-1 - int(back) % len(known)])
        self.acknowledge(USE, made.choice, nonce=made.nonce)

    def expire(self, storage: Storage) -> None:
        """Remove what nobody serves."""
        log.expire(storage, keep_last=1, keep_days=0, grace_days=1)

    def serve(self, storage: Storage, num_polls: str, pause: str) -> None:
        """Serve the version in use; score two bodies, and between the pieces of each look for another version."""
        source = live.BundleSource(SimpleNamespace(model=URL, cache_dir=None))
        source.open = self._open
        model = live.LiveModel(source, MagicMock(), 30.0)
        _done(model.start())
        for _ in range(2):
            with model.held() as scorer:
                for _ in range(int(num_polls)):
                    scorer.score(None)
                    self.world.sleep(seconds(pause))
                    self.begin()
                    _done(model.poll_once())
                scorer.score(None)
            is_closed = scorer is model.model or scorer.close.called
            self.world.expect(is_closed, f"version {scorer.identity.version} is open still, and another one serves")
        model.close()

    def files_of(self, content: dict[str, Any]) -> list[str]:
        """Return the paths of a version's files."""
        return [f"{BUNDLES}/{content['bundle_id']}/{name}" for name in NAMES]

    def kept(self) -> set[int]:
        """Return the newest version, and those that were surely chosen, and in use of late: scorers may open them."""
        since_s = self.world.now_s - 0.99 * self.SPAN_S
        chosen = [each for each in self.logs[USE] if each.is_acknowledged and each.end_s > since_s]
        return super().kept() | {each.content["version"] for each in chosen}

    def finish(self) -> None:
        """See that a scorer that begins now would serve the version that was chosen last."""
        version = self.logs[USE][-1].content["version"]
        self.world.expect(log.version_in_use(self.opened()) == version, f"version {version} is not in use")

    def _open(self, identity: BundleIdentity, current: Any) -> MagicMock:
        """Return what a scorer has of a version; a bad one gives no finite scores."""
        storage, scorer = self.opened(), MagicMock(identity=identity)
        manifest = log.read_version(storage, identity.version)
        for file in manifest.files:
            check_file(storage, f"{manifest.folder}/{file.name}", file, verify=True)
        contents = [storage.read_bytes(f"{manifest.folder}/{name}").decode() for name in NAMES]
        is_mixed, is_bad = len({each.split()[0] for each in contents}) > 1, "bad" in contents[0]

        def score(rows: Any) -> None:
            is_good = not is_bad or rows is not None
            is_sound = not is_mixed and is_good and not scorer.close.called
            self.world.expect(is_sound, f"version {identity.version} serves, and is closed, mixed or bad")
            if is_bad:
                raise NotFiniteError("not finite")

        scorer.sample.return_value, scorer.score.side_effect = pa.table({"row": [1]}), score
        return scorer


def _done(work: Coroutine[Any, Any, Any]) -> None:
    """Run a coroutine that waits for nothing to its end."""
    with contextlib.suppress(StopIteration):
        work.send(None)
        raise AssertionError("it waits")
