"""Histories of published versions: samples by day, checkpoints of a run, and models.

Samples have days that are added to them; models have choices of a version, and scorers that switch at work.
"""

import uuid
from contextlib import suppress
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import MagicMock

import pyarrow as pa

from featurestore.errors import StorageError
from featurestore.published import versions
from featurestore.published.paths import RemotePath
from featurestore.storage.storage import Storage
from pipeline.samples.publish import MARK, replaced_files
from serving.bundle import log
from serving.bundle.files import WrittenFiles, check_file
from serving.bundle.manifest import BUNDLES, USE, BundleManifest, Choice
from serving.errors import NotFiniteError
from serving.http.live import BundleSource, LiveModel
from tests.simulated.history import Entry, History
from tests.simulated.world import seconds
from trainer.runs.folder import finished, step_name
from trainer.runs.saving import DAMAGED, CheckpointPlace, WrittenPart


class PublishedHistory(History):
    """Versions of an address; one that was replaced stays for a while."""

    def read(self, storage: Storage, pause: str) -> None:
        """Open the newest version, and read all of its files a while later."""
        self.begin(seconds(pause))
        newest, opened = len(self.log), versions.open_published(storage.url)
        if not isinstance(opened, versions.PublishedFiles):
            return
        version = opened.published.version
        assert version >= newest, f"the newest version was {newest}, not {version}"
        self.world.sleep(seconds(pause))
        entry = self.log[version - 1]
        for name, path in entry.named.items() if entry.is_whole else ():
            assert opened.read_bytes(name) == self.store.first[f"{self.place}/{path}"].data, f"{name} is another file"


class SampleHistory(PublishedHistory):
    """Samples: whole ones, days that are added to them, readers and expiries."""

    def whole(self, storage: Storage) -> versions.PublishedVersion:
        """Publish samples that are made of nothing before."""
        number, names = next(self.unique), (MARK, "train/whole")
        files = {name: versions.write_part(storage, name, f"{name} {number}".encode()) for name in names}
        return versions.publish(storage, files)

    def add(self, storage: Storage) -> None:
        """Add a day to the samples."""
        before, day = versions.open_published(storage.url), f"train/day-{next(self.unique)}"
        with TemporaryDirectory() as temp, replaced_files(storage.url, before=before, scratch=temp, keep_days=1) as new:
            (new.folder / "train").mkdir()
            (new.folder / day).write_text(day)
            (new.folder / MARK).write_text(f"with {day}")
            for name in before.list("train"):
                new.kept[f"train/{name}"] = f"train/{name}"
        assert any(day in each.named for each in self.log), "a day that was added was never published"

    def expire(self, storage: Storage) -> None:
        """Remove old versions."""
        versions.expire(storage, self.span_s)

    def created(self, entry: Entry) -> None:
        """See that a version to which a day was added keeps all days before."""
        before = self.log[-2].named if len(self.log) > 1 else entry.named
        is_added = any(name.startswith("train/day-") for name in entry.named.keys() - before.keys())
        lost = [name for name, path in before.items() if name != MARK and entry.named.get(name) != path]
        assert not (is_added and lost), f"a day was added, and {lost} lost"


class RunHistory(PublishedHistory):
    """A run: trainings that take it over one after another, and publish checkpoints."""

    def train(self, storage: Storage, num_steps: str, pause: str) -> None:
        """Claim the checkpoints, and write some."""
        run = RemotePath(storage.url).parent
        place = CheckpointPlace(run)
        place.claim()
        first = max((each.step for each in finished(run)), default=0) + 1
        for step in range(first, first + int(num_steps)):
            self.world.sleep(seconds(pause))
            self.begin()
            with suppress(StorageError):  # of one checkpoint: the training continues
                rows = versions.write_part(storage, f"{step_name(step)}-rows", f"rows of {step}".encode())
                place.commit(step, {"rows": WrittenPart("0" * 32, rows)}, f"state of {step}".encode(), 2, None)
                made = self.acknowledge(place._newest_known())
                assert rows.path in made.named.values(), f"checkpoint {step} was acknowledged, and its version lacks it"

    def created(self, entry: Entry) -> None:
        """See that whoever was followed by another publishes nothing more, and that the newest checkpoint stays."""
        *before, by = [each.by for each in self.log]
        assert by not in before[:-1] or by == before[-1], "a training publishes though another one has claimed the run"
        for last in [each for each in self.log[:-1] if each.is_acknowledged][-1:]:
            newest = max(name.removeprefix(DAMAGED) for name in last.named)  # steps have eight digits
            is_kept = newest in entry.named or newest < min(name.removeprefix(DAMAGED) for name in entry.named)
            assert is_kept, f"the newest checkpoint, of {newest}, is lost"


class ModelHistory(History):
    """A model's address, and what is known of it."""

    def export(self, storage: Storage, state: str, when: str) -> Choice | None:
        """Publish a version as `export_model` does."""
        log.remove_leftovers(storage)
        bundle_id = uuid.uuid4().hex
        files = WrittenFiles(storage, f"{BUNDLES}/{bundle_id}")
        for name in ("network.pt2", "model.json"):
            files.write(name, f"{bundle_id} {state}".encode())
        draft = BundleManifest(bundle_id=bundle_id, files=files.files, **self.known["draft"])
        self.acknowledge(log.publish(storage, draft))
        return self.choose(storage, "0") if when == "use" else None

    def choose(self, storage: Storage, back: str) -> Choice:
        """Choose the newest version, or one before it."""
        known = log.known_versions(storage)
        return log.use(storage, known[-1 - int(back) % len(known)])

    def expire(self, storage: Storage) -> None:
        """Remove what nobody serves."""
        log.expire(storage, keep_last=1, keep_days=0, grace_days=1)

    def serve(self, storage: Storage, num_polls: str, pause: str) -> None:
        """Serve the version in use; score two bodies, and between the pieces of each look for another version."""
        source = BundleSource(MagicMock(model=storage.url, cache_dir=None))
        source.open = self._open
        model = LiveModel(source, MagicMock(), 30.0)
        list(model.start().__await__())  # to its end, as nothing in it waits
        for _ in range(2):
            with model.held() as scorer:
                for _ in range(int(num_polls)):
                    scorer.score(None)
                    self.world.sleep(seconds(pause))
                    self.begin()
                    list(model.poll_once().__await__())
                scorer.score(None)
            is_closed = scorer is model.model or scorer.close.called
            assert is_closed, f"version {scorer.identity.version} is open still, and another one serves"
        model.close()

    def kept(self) -> set[int]:
        """Return the newest version, and those that were surely chosen, and in use of late: scorers may open them."""
        since_s = self.world.now_s - 0.99 * self.span_s
        chosen = [each for each in self.logs[USE] if each.is_acknowledged and each.end_s > since_s]
        return super().kept() | {each.content["version"] for each in chosen}

    def look(self, storage: Storage) -> None:
        """See that a scorer that begins now would serve the version that was chosen last."""
        version = self.logs[USE][-1].content["version"]
        assert log.version_in_use(storage) == version, f"version {version} is not in use"

    def _open(self, identity: log.BundleIdentity, current: Any) -> MagicMock:
        """Return what a scorer has of a version; a bad one gives no finite scores."""
        storage, scorer = self.opened(), MagicMock(identity=identity)
        manifest = log.read_version(storage, identity.version)
        for file in manifest.files:
            check_file(storage, f"{manifest.folder}/{file.name}", file, verify=True)
        contents = {storage.read_bytes(f"{manifest.folder}/{file.name}") for file in manifest.files}
        is_bad = min(contents).endswith(b"bad")

        def score(rows: Any) -> None:
            is_sound = len(contents) == 1 and not scorer.close.called and (not is_bad or rows is not None)
            with self.world.failing():
                assert is_sound, f"version {identity.version} serves, and is closed, mixed or bad"
            if is_bad:
                raise NotFiniteError("not finite")

        scorer.sample.return_value, scorer.score.side_effect = pa.table({"row": [1]}), score
        return scorer
