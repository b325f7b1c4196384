"""Histories of a feature store: writers, compactions, expiries, pins, channels, restores and purges at once.

Each commit names what it does, so the rows after it are known. Images are a to d; the first two are in shard 0.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore import FeatureRows, FeatureStore, Snapshot, StoreInfo, errors, key_of_uri
from featurestore.log import CHANNELS, manifest_path
from featurestore.published.versions import ChannelMove
from featurestore.spec import Manifest, seal
from featurestore.upkeep import compaction, expiry, history, purge, verify
from featurestore.upkeep.verify import repair
from tests.simulated.history import Entry, History
from tests.simulated.world import Clients, Stored, World, seconds

PURGED = "a"


class StoreHistory(History):
    """A store, and what is known of it."""

    def __init__(self, world: World, clients: Clients) -> None:
        super().__init__(world, clients)
        self.rows: list[dict[int, tuple[str, float]]] = [{}]
        """By version and key, its uri and the number of the put."""
        self.info, self.pins = StoreInfo(**self.known["info"]), dict[str, int]()
        self.damaged: set[int] = set()

    def opened(self) -> FeatureStore:
        """Open the store; the first time it is made."""
        return FeatureStore.open_or_create(f"sim://{self.place}", self.info)

    def put(self, store: FeatureStore, images: str) -> Manifest:
        """Put rows of images, with `!` under other uris: that is refused unless the key has none at that time."""
        number, uris = next(self.unique), _uris(images)
        features = np.full((len(uris), self.info.dim), number, np.float32)
        rows = FeatureRows.of(list(uris.values()), features, keys=list(uris))
        return store.put(rows, f"put {images} {number}").manifest

    def delete(self, store: FeatureStore, images: str) -> Manifest:
        """Delete rows."""
        return store.delete(list(_uris(images)), f"delete {images}").manifest

    def restore(self, store: FeatureStore, back: str) -> Manifest:
        """Commit an older snapshot again."""
        version = self.before(back)
        made = history.restore(store, version).manifest
        assert made.operation == f"restore {version}", f"{version} was to be restored, and {made.operation} is done"
        return made

    def compact(self, store: FeatureStore, shards: str) -> None:
        """Compact shards."""
        before = len(self.log)
        try:
            compaction.compact(store, force=True, shards=[int(shard) for shard in shards])
        except errors.CommitConflictError:
            for shard in shards:
                of = [{name for name in each.named if f"data/000{shard}" in name} for each in self.log[before - 1 :]]
                is_left = len(of[0]) > 1 and all(of[0] <= each <= of[-1] for each in of)
                assert not is_left, f"a compaction gives up, though nobody has replaced files of {shard}"

    def expire(self, store: FeatureStore, keep_last: str) -> None:
        """Remove what nobody keeps."""
        self.begin(-2 * self.span_s)  # it sees to its time itself
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

    def move(self, store: FeatureStore, channel: str, back: str) -> ChannelMove:
        """Move a channel."""
        return history.move_channel(store, channel, self.before(back))

    def read(self, store: FeatureStore, choice: str, pause: str) -> None:
        """Open a snapshot, and read it a while later."""
        self.begin(0.7 * self.span_s)
        name = min(self.pins, default="newest") if choice == "pinned" else choice
        if name not in ("newest", *self.pins) and f"{CHANNELS}/{name}" not in self.logs:
            return
        newest, snapshot = len(self.log), store.snapshot({"newest": None, **self.pins}.get(name, name))
        assert name != "newest" or snapshot.version >= newest, f"the newest was {newest}, not {snapshot.version}"
        if "purge" not in self.plan:  # that takes files from readers
            self.log[snapshot.version - 1].opened_s = self.world.now_s
        self.world.sleep(seconds(pause))
        self.check(snapshot)

    def purge(self, store: FeatureStore) -> None:
        """Purge the rows of an image, which nobody writes meanwhile."""
        there, num_before = set(self.store.objects), len(self.log)
        try:
            images = purge.Images.of_uris(list(_uris(PURGED).values()))
            report = purge.purge(store, images, writer_hours=self.span_s / 3_600)
        except errors.CommitConflictError:
            others = [each for each in self.log[num_before:] if each.by[0] != self.world.current.name]
            assert len(others) >= 3, "a purge gives up, though nobody is in its way"
            return
        if report.is_complete:
            there |= {f"{self.place}/{path}" for path in self.needed()}
            for path in there & self.store.objects.keys():
                stored = self.store.objects[path]
                if stored.data.startswith(b"PAR1") and stored is self.store.first[path]:  # not written late, since then
                    keys = pq.read_table(pa.BufferReader(stored.data))["key"].to_pylist()
                    assert not _uris(PURGED).keys() & {*keys}, f"{path} has purged rows"

    def mend(self, store: FeatureStore) -> None:
        """Damage the newest manifest on its disk, and repair the store."""
        self.damaged.add(len(self.log))
        path = f"{self.place}/{manifest_path(len(self.log))}"
        self.store.objects[path] = Stored(self.store.objects[path].data[:90], self.world.now_s)
        self.world.sleep(1.0)
        repair(store)

    def look(self, store: FeatureStore) -> None:
        """Look at all that is there."""
        if self.damaged:
            repair(store)
        newest = store.snapshot().version
        assert newest == len(self.log), f"the newest is {newest}, and not {len(self.log)}"
        for version in self.kept():
            self.check(store.snapshot(version))
        found = verify.verify(store).problems  # order: a number that had expired was given again
        problems = [each for each in found if each.kind != "order" and set(each.versions) & self.kept()]
        assert not problems, f"verify finds {problems}"

    def before(self, back: str) -> int:
        """Return the version that is so many before the newest."""
        return max(1, len(self.log) - int(back))

    def kept(self) -> set[int]:
        """Return the newest version, and those of pins and channels."""
        moves = [log[-1].content["version"] for folder, log in self.logs.items() if folder.startswith(CHANNELS) and log]
        return super().kept().union(self.pins.values(), moves) - self.damaged

    def check(self, snapshot: Snapshot) -> None:
        """Compare the rows of a snapshot with those that its commit had."""
        version = snapshot.version
        assert seal(snapshot.manifest) == self.log[version - 1].data, f"snapshot {version} is another commit"
        columns = snapshot.to_arrow(["key", "uri", "feature"]).to_pydict()
        found = {key: (uri, feature[0]) for key, uri, feature in zip(*columns.values(), strict=True)}
        assert found == self.rows[version], f"snapshot {version} has {found}, not {self.rows[version]}"

    def created(self, entry: Entry) -> None:
        """Note the rows after a commit."""
        name, *words = entry.content["operation"].split()
        if name == "restore":
            rows = self.rows[int(words[0])]
        elif name == "repair":
            ids = [each.content["commit_id"] for each in self.log]
            rows = self.rows[ids.index(entry.content["parent"]) + 1]
        else:
            rows = dict(self.rows[-1])
            images = words[0] if name in ("put", "delete") else PURGED if name == "purge" else ""
            for key, uri in _uris(images).items():
                old = rows.pop(key, None)
                if name == "put":
                    assert old is None or old[0] == uri, f"{uri} and {old} have one key by {name}"
                    rows[key] = (uri, float(words[1]))
        self.rows.append(rows)


def _uris(images: str) -> dict[int, str]:
    """Return the uris of images by their keys; with `!` these are other ones."""
    other = "other-" if images.endswith("!") else ""
    uris = [f"{image}23" for image in images.rstrip("!")]
    return {key_of_uri(uri): other + uri for uri in uris}
