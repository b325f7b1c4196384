"""Histories of a feature store: writers, compactions, expiries, pins, channels, restores and purges at once.

Each commit names what it does, so the rows after it are known. Images are a to d; the first two are in shard 0.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore import ExtractorSpec, FeatureRows, FeatureStore, Snapshot, StoreInfo, errors, key_of_uri
from featurestore.log import CHANNELS, LOG, manifest_path
from featurestore.published.versions import last_move
from featurestore.upkeep import compaction, expiry, history, purge, verify
from featurestore.upkeep.repair import repair
from tests.simulated.history import History
from tests.simulated.world import seconds

URIS = {image: f"u{place}" for place, image in enumerate("abcd")}
KEYS = {image: key_of_uri(uri) for image, uri in URIS.items()}
PURGED = "a"
Rows = dict[int, tuple[str, float]]
"""By key, its uri and the number of the put."""
INFO = StoreInfo(
    dim=2,
    num_shards=2,
    dtype="float32",
    extractor=ExtractorSpec(backbone="b", layer="l", weights_digest="w", preprocessing="p", compute_dtype="float32"),
)


class StoreHistory(History):
    """A store, and what is known of it."""

    PLACE, LOG = "w/store", LOG
    SPAN_S, MOST_S = seconds("1d"), seconds("0.9d")
    """From the first file of a commit to its end, and from the opening of a snapshot to its last row."""

    def prepare(self, patch: pytest.MonkeyPatch) -> None:
        """Make the store, with two commits."""
        self.rows, self.paths = [Rows()], [frozenset[str]()]
        """By version."""
        self.pins: dict[str, int] = {}
        self.read_now: list[int] = []
        self.has_purged = False
        store = FeatureStore.create(f"sim://{self.PLACE}", INFO)
        for images in ("a", "ab"):
            self.put(store, images)

    def opened(self) -> FeatureStore:
        """Open the store."""
        return FeatureStore.open(f"sim://{self.PLACE}")

    def put(self, store: FeatureStore, images: str) -> None:
        """Put rows of images, with `!` under other uris: that is refused unless the key has none at that time."""
        rows, name = self._to_put(images)
        self._acknowledge(store.put(rows, name), name)

    def late(self, store: FeatureStore, images: str) -> None:
        """Put rows so late that an expiry may have removed their files, which refuses the commit."""
        rows, name = self._to_put(images)
        entries = store.write(rows)
        self.world.sleep(2 * self.SPAN_S)
        self.may_be_corrupt = True
        self._acknowledge(store.commit(entries, name), name)

    def delete(self, store: FeatureStore, images: str) -> None:
        """Delete rows."""
        name = f"delete {images}"
        self._acknowledge(store.delete(list(_uris(images)), name), name)

    def restore(self, store: FeatureStore, back: str) -> None:
        """Commit an older snapshot again."""
        version = self.before(back)
        self._acknowledge(history.restore(store, version), f"restore {version}")

    def compact(self, store: FeatureStore, shards: str) -> None:
        """Compact shards."""
        before = self.newest
        try:
            compaction.compact(store, force=True, shards=[int(shard) for shard in shards])
        except errors.CommitConflictError:
            for shard in shards:
                first, *later = [{f for f in each if f.startswith(f"data/000{shard}")} for each in self.paths[before:]]
                is_left = len(first) > 1 and all(first <= each <= later[-1] for each in later)
                self.world.expect(not is_left, f"a compaction gives up, though nobody has replaced files of {shard}")

    def expire(self, store: FeatureStore, keep_last: str) -> None:
        """Remove what nobody keeps."""
        self.world.current.patience_s += 2 * self.SPAN_S  # it sees to that itself
        expiry.expire(store, keep_last=int(keep_last), keep_days=0, grace_days=1)

    def pin(self, store: FeatureStore, back: str) -> None:
        """Pin a late snapshot."""
        name = f"p{next(self.unique)}"
        self.pins[name] = history.pin(store, name, None if back == "newest" else self.before(back)).version

    def unpin(self, store: FeatureStore) -> None:
        """Remove a pin."""
        for name in list(self.pins)[:1]:
            del self.pins[name]
            history.unpin(store, name)

    def move(self, store: FeatureStore, channel: str, back: str, when: str) -> None:
        """Move a channel, perhaps only if nobody did meanwhile."""
        last = last_move(store.storage, channel)
        after = (last.number if last else 0) if when == "if" else None
        made = history.move_channel(store, channel, self.before(back), after=after)
        self.world.expect(after in (None, made.number - 1), f"channel {channel} was moved meanwhile, and again")
        self.acknowledged.append((f"{CHANNELS}/{channel}", made.number, "nonce", made.nonce))

    def read(self, store: FeatureStore, choice: str, pause: str) -> None:
        """Open a snapshot, and read it a while later."""
        self.world.current.patience_s -= 0.7 * self.SPAN_S
        name = min(self.pins, default="newest") if choice == "pinned" else choice
        newest, has_channel = self.newest, bool(self.logs[f"{CHANNELS}/{name}"])
        try:
            snapshot = store.snapshot({"newest": None, **self.pins}.get(name, name))
        except (errors.ChannelError, errors.SnapshotNotFoundError) as error:
            is_kept = (has_channel or name in self.pins) and not self.damaged
            self.world.expect(not is_kept, f"{name} cannot be opened: {error}")
            return
        is_late = name == "newest" and snapshot.version < newest
        self.world.expect(not is_late, f"the newest was {newest}, not {snapshot.version}")
        self.read_now.append(snapshot.version)
        try:
            self.world.sleep(seconds(pause))
            self.check(snapshot)
        finally:
            self.read_now.remove(snapshot.version)

    def purge(self, store: FeatureStore) -> None:
        """Purge the rows of an image."""
        self.has_purged = self.may_be_corrupt = True
        there, num_before = set(self.store.objects), len(self.creators)
        pins = {name: version for name, version in self.pins.items() if KEYS[PURGED] in self.rows[version]}
        try:
            report = purge.purge(store, purge.Images.of_uris([URIS[PURGED]]), writer_hours=self.SPAN_S / 3_600)
        except errors.CommitConflictError:
            others = [each for each in self.creators[num_before:] if each is not self.world.current]
            self.world.expect(len(others) >= 3, "a purge gives up, though nobody is in its way")
            return
        kept = [name for name, version in pins.items() if self.pins.get(name) == version]
        self.world.expect(not kept, f"rows were purged that {kept} keep")
        if report.is_complete:
            known = [v for v in range(1, self.newest + 1) if manifest_path(v) not in self.strays]
            in_log = [v for v in known if self.is_there(manifest_path(v))]
            paths = {f"{self.PLACE}/{path}" for v in in_log for path in self.paths[v]}
            proved_s = self.world.asked_s[self.world.current, f"list {self.PLACE}"]
            left = [path for path in there | paths if self._has_purged_row(path, proved_s)]
            self.world.expect(not left, f"{left} have purged rows")
            lost = paths - self.store.objects.keys()
            self.world.expect(not lost, f"{lost} are in the log, and gone")

    def mend(self, store: FeatureStore) -> None:
        """Damage the newest manifest on its disk, unless it is the last good one, and repair the store."""
        if not any(self.is_there(manifest_path(version)) for version in range(1, self.newest)):
            return
        self.damaged.add(self.newest)
        self.may_be_corrupt = True
        stored = self.store.objects[f"{self.PLACE}/{manifest_path(self.newest)}"]
        stored.data = stored.data[:90]
        self.world.sleep(1.0)
        repair(store)

    def finish(self) -> None:
        """Look at all that is there at the end."""
        super().finish()
        store = self.opened()
        if self.damaged:
            repair(store)
        self.world.expect(store.snapshot().version == self.newest, f"the newest is not {self.newest}")
        for version in self.kept():
            self.check(store.snapshot(version))
        excused = "order" if any(path.startswith(f"{LOG}/") for path in self.strays) else ""
        found = verify.verify(store).problems
        problems = [each for each in found if each.kind != excused and set(each.versions) & self.kept()]
        self.world.expect(not problems, f"verify finds {problems}")

    def before(self, back: str) -> int:
        """Return the version that is so many before the newest."""
        return max(1, self.newest - int(back))

    def files(self, version: int) -> frozenset[str]:
        """Return the paths of a snapshot's data files."""
        return self.paths[version]

    def kept(self) -> set[int]:
        """Return the newest version, and those of pins and channels."""
        moves = [log[-1].content["version"] for folder, log in self.logs.items() if folder.startswith(CHANNELS) and log]
        return {self.newest, *self.pins.values(), *moves} - self.damaged

    def held(self) -> list[int]:
        """Return the versions that are read, where no purge takes their files."""
        return [] if self.has_purged else self.read_now

    def check(self, snapshot: Snapshot) -> None:
        """Compare the rows of a snapshot with those that its commit had."""
        version = snapshot.version
        is_same = snapshot.manifest.commit_id == self.logs[LOG][version - 1].content["commit_id"]
        self.world.expect(is_same, f"snapshot {version} is another commit")
        try:
            columns = snapshot.to_arrow(["key", "uri", "feature"]).to_pydict()
        except errors.CorruptFileError as error:
            is_needed = version in (*self.kept(), *self.held())
            self.world.expect(not is_needed, f"snapshot {version} cannot be read: {error}")
            return
        found = {key: (uri, feature[0]) for key, uri, feature in zip(*columns.values(), strict=True)}
        self.world.expect(found == self.rows[version], f"snapshot {version} has {found}, not {self.rows[version]}")

    def created(self, content: dict[str, Any]) -> None:
        """Note the files of a commit, and the rows after it."""
        self.paths.append(frozenset(file["path"] for files in content["shards"].values() for file in files))
        self.rows.append(self._after(content, self.rows[-1]))

    def _of_commit(self, commit_id: str) -> Rows:
        """Return the rows of a commit; a repair may find a stray to be the newest that is good."""
        for version, each in enumerate(self.logs[LOG], start=1):
            if each.content["commit_id"] == commit_id:
                return self.rows[version]
        (stray,) = [each for each in self.strays.values() if each.get("commit_id") == commit_id]
        return self._after(stray, self._of_commit(stray["parent"]))

    def _after(self, content: dict[str, Any], before: Rows) -> Rows:
        """Return the rows after a commit that was made on others."""
        name, *words = content["operation"].split()
        if name == "restore":
            return self.rows[int(words[0])]
        if name == "repair":
            return self._of_commit(content["parent"])
        rows = dict(before)
        images = words[0] if name in ("put", "delete") else PURGED if name == "purge" else ""
        for key, uri in _uris(images).items():
            old = rows.pop(key, None)
            if name == "put":
                self.world.expect(old is None or old[0] == uri, f"{uri} and {old} have one key by {name}")
                rows[key] = (uri, float(words[1]))
        return rows

    def _to_put(self, images: str) -> tuple[FeatureRows, str]:
        """Make the rows of a put, and name it."""
        number, uris = next(self.unique), _uris(images)
        features = np.full((len(uris), INFO.dim), number, np.float32)
        return FeatureRows.of(list(uris.values()), features, keys=list(uris)), f"put {images} {number}"

    def _acknowledge(self, snapshot: Snapshot, operation: str) -> None:
        there = snapshot.manifest.operation
        self.world.expect(there == operation, f"{operation} was acknowledged as {snapshot.version}, which is {there}")
        self.acknowledged.append((LOG, snapshot.version, "commit_id", snapshot.manifest.commit_id))

    def _has_purged_row(self, path: str, before_s: float) -> bool:
        stored = self.store.objects.get(path)
        if stored is None or stored.mtime_s > before_s or stored.data[:4] != b"PAR1":
            return False
        return KEYS[PURGED] in pq.read_table(pa.BufferReader(stored.data))["key"].to_pylist()


def _uris(images: str) -> dict[int, str]:
    """Return the uris of images by their keys; with `!` these are other ones."""
    other = "other-" if images.endswith("!") else ""
    return {KEYS[image]: other + URIS[image] for image in images.rstrip("!")}
