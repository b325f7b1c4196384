"""Histories of a feature store: writers, compactions, expiries, pins, channels, restores and purges at once.

What counts is what was created in the log, in its order: each commit names what it does, so the rows after each are
known. It is looked up when an object is created or removed, and when a client reads.
"""

import contextlib
import json
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore import ExtractorSpec, FeatureRows, FeatureStore, Snapshot, StoreInfo, key_of_uri, log
from featurestore.errors import (
    ChannelError,
    CommitConflictError,
    CorruptFileError,
    KeyCollisionError,
    PinError,
    SnapshotNotFoundError,
    StorageError,
)
from featurestore.published.versions import last_move
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import expire
from featurestore.upkeep.history import move_channel, pin, restore, unpin
from featurestore.upkeep.purge import Images, purge
from featurestore.upkeep.repair import repair
from featurestore.upkeep.verify import verify
from tests.simulated.world import DAY_S, HOUR_S, Aim, History, Operation, Plan, World, do, draw_plan

PLACE = "w/store"
GRACE_DAYS = 1.0
GRACE_S = GRACE_DAYS * DAY_S
MOST_S = 0.9 * GRACE_S
"""From the first file of a commit to its end, and from the opening of a snapshot to its last row."""
URIS = [f"u{i}" for i in range(4)]
KEYS = [key_of_uri(uri) for uri in URIS]
CHANNELS = ("stable", "next")
PURGED = 0
Rows = dict[int, tuple[str, float]]
"""By key, its uri and the number of the put."""
WEIGHTS = {"put": 6, "delete": 2, "compact": 4, "restore": 2, "expire": 4, "pin": 3, "unpin": 2, "channel": 3}
WEIGHTS |= {"read": 4, "late": 1}
DECIDES = (
    "create .*/log/", "delete .*/log/", "(list|read) .*/log", "overwrite .*/expired/", "(list|create) .*/pins",
    "(list|create) .*/channels", "delete .*/data/", "look .*/data/",
)  # fmt: skip
AT_COMMIT, AT_COPY = "create .*/log/", "(read|overwrite) .*/expired/"
OLD_S = 1.3 * GRACE_S
KEEP_1, KEEP_2, ALL_SHARDS, SHARD_0, NEWEST, ONE_BEFORE, LATER = 0, 1, 3, 2, 0, 4, 20
"""Arguments: of an expiry; of a compaction; of a channel and a purge; of a channel and a pin; of a read."""


def _put(mask: int) -> int:
    """Return the argument of a put of some images: the first two are in shard 0."""
    return mask << 3 | 1


SCENES: tuple[Plan, ...] = (
    [  # a writer is away until its number has expired; while it takes its commit back another expiry comes
        [do("put", _put(6), 0, Aim(AT_COMMIT, 300), Aim("delete .*/log/", 300))],
        [do("put", _put(1), 5), do("put", _put(2), 1), do("expire", KEEP_1, 1), do("expire", KEEP_1, 350)],
    ],
    [[do("late", _put(6))], [do("expire", KEEP_1, OLD_S)]],
    [[do("put", _put(4)), do("restore", 1, 1)]],
    [  # a compaction loses one shard of two
        [do("put", _put(12)), do("put", _put(12)), do("compact", ALL_SHARDS, 5, Aim(AT_COMMIT, 60))],
        [do("compact", SHARD_0, 20)],
    ],
    [  # a late pin, of a snapshot whose files no other has
        [do("compact", ALL_SHARDS, OLD_S), do("expire", KEEP_1, 1, Aim(AT_COPY, 60))],
        [do("pin", ONE_BEFORE, OLD_S + 20)],
    ],
    [
        [do("expire", KEEP_1, 0, Aim("overwrite .*/expired/", 60), Aim("list .*/pins", 60))],
        [do("channel", ONE_BEFORE, 20, Aim("create .*/channels/", 70))],
    ],
    [[do("pin", ONE_BEFORE, 0, Aim("create .*/pins/", 60))], [do("expire", KEEP_1, 10)]],
    [[do("channel", ONE_BEFORE, 0, Aim("create .*/channels/", 60))], [do("expire", KEEP_1, 10)]],
    [  # two expiries beside a reader
        [do("compact", ALL_SHARDS, OLD_S), do("expire", KEEP_1, 1), do("expire", KEEP_1, 10)],
        [do("read", LATER, OLD_S - 10)],
    ],
    [  # an expiry sleeps for hours, and another one takes its copy away
        [do("expire", KEEP_1, 0, Aim(AT_COPY, 0), Aim("list .*/channels", 15 * HOUR_S))],
        [do("expire", KEEP_2, 13 * HOUR_S), do("pin", ONE_BEFORE, 1)],
    ],
    [[do("pin", 1), do("purge", 0, 1)]],
    [[do("channel", NEWEST), do("purge", 0, 1)]],
    [[do("purge", 0, 0, Aim(AT_COMMIT, 60))], [do("put", _put(2), 20)]],
    [[do("compact", ALL_SHARDS, 0, Aim(AT_COMMIT, 600))], [do("purge", 0, 20)]],
    [[do("damage"), do("repair", 0, 1)], [do("put", _put(2), 30), do("put", _put(4))]],
    [  # an expiry after a repair, beside a reader of what was damaged
        [do("damage", 0, OLD_S), do("repair", 0, 1), do("expire", KEEP_1, 1)],
        [do("read", LATER, OLD_S - 10)],
    ],
    [[do("put", _put(6), 0, Aim(AT_COMMIT, 250, "lost"))], [do("put", _put(2), 1)]],
    [[do("read", LATER, 0, Aim("read .*/log/", 60))], [do("put", _put(6)), do("expire", KEEP_1, 1)]],
)
INFO = StoreInfo(
    dim=2,
    num_shards=2,
    dtype="float32",
    extractor=ExtractorSpec(backbone="b", layer="l", weights_digest="w", preprocessing="p", compute_dtype="float32"),
)


@dataclass(frozen=True)
class Committed:
    """A commit as it was created: its id, its files, and the rows after it."""

    commit_id: str
    operation: str
    paths: frozenset[str]
    rows: Rows

    def of_shard(self, shard: int) -> frozenset[str]:
        """Return the files of a shard."""
        return frozenset(path for path in self.paths if path.startswith(f"data/{shard:04d}/"))


@dataclass
class StoreHistory(History):
    """A store, and what is known of it."""

    GOOD = (StorageError, CommitConflictError, SnapshotNotFoundError)
    PLACE, MOST_S, DECIDES, SCENES = PLACE, MOST_S, DECIDES, SCENES

    world: World
    commits: list[Committed] = field(default_factory=list)
    moves: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in CHANNELS})
    pins: dict[str, int] = field(default_factory=dict)
    held: list[int] = field(default_factory=list)
    acknowledged: list[tuple[int, str]] = field(default_factory=list)
    has_purged: bool = False
    damaged: set[int] = field(default_factory=set)
    excused: tuple[str, ...] = ()
    num_late: int = 0
    num_expiring: int = 0
    num_changes: Counter[str] = field(default_factory=Counter)
    """Commits, pins and moves of channels by the clients that made them."""

    @staticmethod
    def plan(draw: random.Random) -> Plan:
        """Draw what clients do."""
        weights = {name: weight for name, weight in WEIGHTS.items() if draw.random() < 0.75} | {"put": 6}
        plan = draw_plan(draw, weights, GRACE_S, DECIDES)
        if draw.random() < 0.15:  # beside which nobody may write rows of the image, or restore them
            plan = [[_without_purged(each) for each in operations if each.name != "restore"] for operations in plan]
            plan.append([Operation("purge", 0, draw.choice([0.0, 60.0]))])
        elif draw.random() < 0.15:
            mended = [Operation("damage", 0, draw.choice([0.0, 60.0])), Operation("repair", 0, 0.0)]
            plan += [mended] * draw.randint(1, 2)
        return plan

    def prepare(self) -> None:
        """Make the store, with two commits."""
        self.world.watchers.append(self.watch)
        store = FeatureStore.create(f"sim://{PLACE}", INFO)
        for number in (15, 11):
            self.put(store, number)

    def opened(self) -> FeatureStore:
        """Open the store."""
        return FeatureStore.open(f"sim://{PLACE}")

    def patience_s(self, operation: str) -> float:
        """Return how long an operation may take: less than the grace time, but for an expiry, which sees to that."""
        return 3 * DAY_S if operation == "expire" else self.MOST_S

    def perform(self, operation: Operation) -> None:
        """Do an operation; what began from a file that is purged or damaged fails."""
        try:
            super().perform(operation)
        except CorruptFileError as error:
            self.world.expect(self.has_purged or self.damaged, f"{operation.name}: {error}")

    def put(self, store: FeatureStore, number: int) -> None:
        """Put some rows; one in four gives a key another uri, which is refused unless it has none at that time."""
        with contextlib.suppress(KeyCollisionError):
            self._acknowledge(store.put(_rows(number), f"put {number}"), f"put {number}")

    def late(self, store: FeatureStore, number: int) -> None:
        """Put rows so late that an expiry may have removed their files, which refuses the commit."""
        with contextlib.suppress(KeyCollisionError, CorruptFileError):
            entries = store.write(_rows(number))
            self.world.sleep(2 * GRACE_S)
            if self.num_expiring or self.world.has_late:  # an expiry may have looked at these files already
                return
            self.world.current.patience_s = self.world.now_s
            self.num_late += 1
            try:
                self._acknowledge(store.commit(entries, f"put {number}"), f"put {number}")
            finally:
                self.num_late -= 1

    def delete(self, store: FeatureStore, number: int) -> None:
        """Delete some rows."""
        name = f"delete {number}"
        self._acknowledge(store.delete([KEYS[i] for i in _chosen(number)], name), name)

    def compact(self, store: FeatureStore, number: int) -> None:
        """Compact all shards, or one."""
        shards, before = [number % 2] if number % 3 else [0, 1], len(self.commits)
        try:
            compact(store, force=True, shards=shards)
        except CommitConflictError:
            files = [[each.of_shard(shard) for each in self.commits[before - 1 :]] for shard in shards]
            left = [each[0] for each in files if len(each[0]) > 1 and each[-1] >= frozenset().union(*each)]
            self.world.expect(not left, f"a compaction gives up, though nobody has replaced {left}")

    def restore(self, store: FeatureStore, number: int) -> None:
        """Commit an older snapshot again."""
        version = max(1, len(self.commits) - number % 3)
        self._acknowledge(restore(store, version), f"restore {version}")

    def expire(self, store: FeatureStore, number: int) -> None:
        """Remove what nobody keeps."""
        if self.num_late:
            return
        self.num_expiring += 1
        try:
            expire(store, keep_last=1 + number % 2, keep_days=0, grace_days=GRACE_DAYS)
        finally:
            self.num_expiring -= 1

    def pin(self, store: FeatureStore, number: int) -> None:
        """Pin a late snapshot."""
        version = None if number % 2 else max(1, len(self.commits) - number % 3)
        self.pins[f"p{number}"] = pin(store, f"p{number}", version).version

    def unpin(self, store: FeatureStore, number: int) -> None:
        """Remove a pin."""
        for name in list(self.pins)[:1]:
            del self.pins[name]
            unpin(store, name)

    def channel(self, store: FeatureStore, number: int) -> None:
        """Move a channel, one time in two only if nobody did meanwhile."""
        name = CHANNELS[number % 2]
        last = last_move(store.storage, name) if number & 2 else None
        after = (last.number if last else 0) if number & 2 else None
        made = move_channel(store, name, max(1, len(self.commits) - (number >> 2) % 3), after=after)
        self.world.expect(after is None or made.number == after + 1, f"channel {name} was moved meanwhile, and again")

    def read(self, store: FeatureStore, number: int) -> None:
        """Open the newest snapshot a few times; open one, and read it a while later."""
        for _ in range(4):
            newest = self._newest()
            version = store.snapshot().version
            self.world.expect(version >= newest, f"the newest was {newest}, not {version}")
        choice = ["newest", "newest", *CHANNELS, *sorted(self.pins)][number % (4 + len(self.pins))]
        newest, was_there, pinned = (
            self._newest(),
            bool(self.moves.get(choice)),
            self.pins.get(choice),
        )
        try:
            snapshot = store.snapshot(None if choice == "newest" else pinned or choice)
        except (ChannelError, SnapshotNotFoundError) as error:
            may_lack = self.damaged or (pinned and choice not in self.pins) or (not pinned and not was_there)
            self.world.expect(may_lack, f"{choice} cannot be opened: {error}")
            return
        is_late = choice == "newest" and snapshot.version < newest
        self.world.expect(not is_late, f"the newest was {newest}, not {snapshot.version}")
        self.held.append(snapshot.version)
        try:
            self.world.sleep([0.0, 600.0, 0.7 * GRACE_S][number % 3])
            self.check(snapshot)
        finally:
            self.held.remove(snapshot.version)

    def purge(self, store: FeatureStore, number: int) -> None:
        """Purge the rows of an image."""
        there, self.has_purged, me = set(self.world.objects), True, self.world.current
        pins = {name: v for name, v in self.pins.items() if KEYS[PURGED] in self.commits[v - 1].rows}
        before = self.num_changes.total() - self.num_changes[me.name]
        try:
            report = purge(store, Images.of_uris([URIS[PURGED]]))
        except PinError:
            return
        except CommitConflictError:
            meanwhile = self.num_changes.total() - self.num_changes[me.name] - before
            self.world.expect(meanwhile >= 3, "a purge gives up, though nobody is in its way")
            return
        kept = [name for name, version in pins.items() if self.pins.get(name) == version]
        self.world.expect(not kept, f"rows were purged that {kept} keep")
        if report.is_complete:
            paths = {f"{PLACE}/{path}" for each in self._in_log() for path in each.paths}
            left = [path for path in there | paths if path in self.world.objects and self._has_purged_row(path)]
            self.world.expect(not left, f"{left} have purged rows")
            lost = paths - self.world.objects.keys()
            self.world.expect(not lost, f"{lost} are in the log, and gone")

    def damage(self, store: FeatureStore, number: int) -> None:
        """Damage the newest manifest on its disk."""
        self.damaged.add(len(self.commits))
        stored = self.world.objects[f"{PLACE}/{log.manifest_path(len(self.commits))}"]
        stored.data = stored.data[:90]

    def repair(self, store: FeatureStore, number: int) -> None:
        """Repair the store."""
        repair(store)

    def _has_purged_row(self, path: str) -> bool:
        data = self.world.objects[path].data
        if data[:4] != b"PAR1":
            return False
        return KEYS[PURGED] in pq.read_table(pa.BufferReader(data), columns=["key"])["key"].to_pylist()

    def finish(self) -> None:
        """Look at all that is there at the end."""
        store = FeatureStore.open(f"sim://{PLACE}")
        ids = {version: each.commit_id for version, each in enumerate(self.commits, start=1)}
        if self.damaged:
            repair(store)
        for version, commit_id in self.acknowledged:
            where = [place for place, each in ids.items() if each == commit_id and place not in self.damaged]
            is_there = where == ([] if version in self.damaged else [version])
            self.world.expect(is_there, f"{commit_id} was acknowledged as {version}, and is at {where}")
        self.world.expect(store.snapshot().version == len(self.commits), f"the newest is not {len(self.commits)}")
        for version in self._kept():
            self.check(store.snapshot(version))
        found = verify(store).problems
        problems = [each for each in found if set(each.versions) & self._kept() and each.kind not in self.excused]
        self.world.expect(not problems, f"verify finds {problems}")

    def check(self, snapshot: Snapshot) -> None:
        """Compare the rows of a snapshot with those that its commit had."""
        commit = self.commits[snapshot.version - 1]
        self.world.expect(
            snapshot.manifest.commit_id == commit.commit_id, f"snapshot {snapshot.version} is another commit"
        )
        try:
            table = snapshot.to_arrow(["key", "uri", "feature"])
        except CorruptFileError as error:
            kept = snapshot.version in self._kept() or not self.has_purged
            self.world.expect(not kept, f"snapshot {snapshot.version} cannot be read: {error}")
            return
        columns = (table[name].to_pylist() for name in ("key", "uri", "feature"))
        found = {key: (uri, feature[0]) for key, uri, feature in zip(*columns, strict=True)}
        self.world.expect(found == commit.rows, f"snapshot {snapshot.version} has {found} instead of {commit.rows}")

    def watch(self, action: str, path: str, data: bytes | None) -> None:
        """Note what is created, and see that nothing is removed that is needed."""
        folder, _, name = path.removeprefix(f"{PLACE}/").rpartition("/")
        version = log.version_of(name) or 0
        self.num_changes[self.world.current.main.name] += action == "create"
        if folder == log.LOG and data is not None and version not in self.damaged:
            self.world.expect(path not in self.world.objects or self.damaged, f"manifest {version} is replaced")
            self._note_commit(json.loads(data))
        elif action == "create" and folder.startswith(log.CHANNELS) and data is not None:
            self.moves[folder.rpartition("/")[2]].append(json.loads(data)["version"])
        elif folder == log.EXPIRED and data is not None and path in self.world.objects and version not in self.damaged:
            true_id = self.commits[version - 1].commit_id.encode()
            is_lost = true_id in self.world.objects[path].data and true_id not in data
            self.world.expect(not is_lost, f"another manifest takes the place of the copy of snapshot {version}")
        elif action == "delete" and folder == log.LOG:
            there = self.world.objects[path].data
            is_commit = version in self._kept() and self.commits[version - 1].commit_id.encode() in there
            self.world.expect(not is_commit, f"snapshot {version} is removed, though it is kept")
        elif action == "delete" and folder.startswith("data/"):
            held = () if self.has_purged else self.held
            needed = [v for v in {*self._kept(), *held} if f"{folder}/{name}" in self.commits[v - 1].paths]
            self.world.expect(not needed, f"{path} is removed, which snapshots {needed} need")

    def _in_log(self) -> list[Committed]:
        """List the commits whose manifests are in the log."""
        paths = [f"{PLACE}/{log.manifest_path(version)}" for version in range(1, len(self.commits) + 1)]
        found = zip(map(self.world.objects.get, paths), self.commits, strict=True)
        return [each for stored, each in found if stored and each.commit_id.encode() in stored.data]

    def _newest(self) -> int:
        """Give the newest version that is not damaged."""
        return max({*range(len(self.commits) + 1)} - self.damaged)

    def _kept(self) -> set[int]:
        """Find the versions that have to stay: the newest, and those of pins and channels."""
        pointed = {moves[-1] for moves in self.moves.values() if moves}
        return {len(self.commits), *self.pins.values(), *pointed} - {0} - self.damaged

    def _acknowledge(self, snapshot: Snapshot, operation: str) -> None:
        there = snapshot.manifest.operation
        self.world.expect(there == operation, f"{operation} was acknowledged as {snapshot.version}, which is {there}")
        self.acknowledged.append((snapshot.version, snapshot.manifest.commit_id))

    def _note_commit(self, manifest: dict) -> None:
        if manifest["version"] != len(self.commits) + 1:
            self.excused = ("order",)  # of a writer that was away while the true one expired, until an expiry comes
            return
        operation, before = manifest["operation"], self.commits[-1].rows if self.commits else {}
        paths = frozenset(file["path"] for files in manifest["shards"].values() for file in files)
        by_id = {each.commit_id: each.rows for each in self.commits}
        rows = by_id[manifest["parent"]] if operation == "repair" else self._after(operation, before)
        self.commits.append(Committed(manifest["commit_id"], operation, paths, rows))

    def _after(self, operation: str, before: Rows) -> Rows:
        """Return the rows after a commit."""
        name, _, text = operation.partition(" ")
        number = int(text or 0)
        if name == "restore":
            return self.commits[number - 1].rows
        rows = dict(before)
        if name == "purge":
            rows.pop(KEYS[PURGED], None)
        for place in _chosen(number) if name in ("put", "delete") else ():
            uri = f"other-{URIS[place]}" if number % 4 == 2 else URIS[place]
            old = rows.pop(KEYS[place], None)
            if name == "put":
                self.world.expect(old is None or old[0] == uri, f"key {place} has two uris by {operation}")
                rows[KEYS[place]] = (uri, float(number))
        return rows


def _without_purged(operation: Operation) -> Operation:
    return operation._replace(argument=operation.argument & ~8 | 16)


def _rows(number: int) -> FeatureRows:
    """Make the rows of a put."""
    uris = {KEYS[i]: f"other-{URIS[i]}" if number % 4 == 2 else URIS[i] for i in _chosen(number)}
    return FeatureRows.of(list(uris.values()), np.full((len(uris), 2), number, np.float32), keys=list(uris))


def _chosen(number: int) -> Iterable[int]:
    """Choose the images that an operation is of."""
    bits = number >> 3 or number
    return [i for i in range(len(URIS)) if bits >> i & 1] or [number % len(URIS)]
