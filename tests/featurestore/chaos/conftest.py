"""A store under attack: processes that write down what they do, and the checker of what came of it.

Every row tells on itself: its source tag names the operation that wrote it, and its feature is a function of that name
and of its uri. Every operation's text in the manifest says what it did, so the log alone can be replayed.
"""

import contextlib
import itertools
import json
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Container, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import xxhash

from featurestore import FeatureRows, FeatureStore, Snapshot, StoreInfo, key_of_uri, keys_of_uris, log, shard_of
from featurestore import store as store_module
from featurestore.errors import CommitConflictError, CorruptFileError
from featurestore.spec import Manifest
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import expire
from tests.featurestore.staged import build_shard
from tests.fuse import SMALL, Fuse, small_process

GRACE_S = 5.0
"""Of an expiry: what is older may go while somebody reads it."""
Contents = dict[int, str]  # the name of the operation that wrote each key


def rows_of(name: str, uris: Sequence[str], dim: int = 8) -> FeatureRows:
    """Rows of the operation `name`."""
    features = [feature_of(name, uri, dim) for uri in uris]
    return FeatureRows.of(uris, np.array(features, np.uint16).reshape(len(uris), dim), source_tags=[name] * len(uris))


def feature_of(name: str, uri: str, dim: int = 8) -> np.ndarray:
    """bfloat16 bits (D,), finite."""
    return np.frombuffer(xxhash.xxh3_128_digest(f"{name} {uri}".encode()), np.uint16)[:dim] & np.uint16(0x3FFF)


def contents_of(snapshot: Snapshot) -> Contents:
    """What the snapshot holds. Fails on a row that is not what its operation wrote, or stands twice or astray."""
    found: Contents = {}
    for shard in range(snapshot.info.num_shards):
        rows = snapshot.read_shard(shard)
        assert (shard_of(rows.keys_N, snapshot.info.num_shards) == shard).all(), f"strays in shard {shard}"
        for key, uri, name, feature in zip(
            rows.keys_N.tolist(), rows.uris, rows.source_tag, rows.features_ND, strict=True
        ):
            assert key not in found, f"{uri} stands twice in snapshot {snapshot.version}"
            assert key == key_of_uri(uri), f"{uri} stands under another key"
            assert np.array_equal(feature, feature_of(name, uri)), f"{uri} of {name} is not what was written"
            found[key] = name
    return found


def replay(manifests: Sequence[Manifest]) -> list[Contents]:
    """Contents after each version, from the operations' texts alone; the first is the empty store."""
    states: list[Contents] = [{}]
    for manifest in manifests:
        verb, *words = manifest.operation.split()
        state = dict(states[-1])
        if verb == "put":
            state.update({key_of_uri(uri): words[0] for uri in words[1:]})
        elif verb == "delete":
            for uri in words[1:]:
                state.pop(key_of_uri(uri), None)
        elif verb == "restore":
            state = states[int(words[0])]
        else:
            assert verb == "compact", f"unknown operation {manifest.operation!r}"
        states.append(state)
    return states


def manifests_of(store: FeatureStore, known: Container[int]) -> Iterator[Manifest]:
    """Those in the log, and those that have expired not long ago; without the known ones."""
    in_log = log.versions(store.storage)  # first: a manifest on its way is copied before it goes
    for version in sorted({*in_log, *log.versions(store.storage, log.EXPIRED)}):
        if version not in known and (manifest := log.find(store.storage, version)) is not None:
            yield manifest


def notes_in(folder: Path) -> list[dict]:
    """What all processes noted, by time. A line without an end is being written, or its writer died over it."""
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().split("\n")[:-1]]
    return sorted(map(json.loads, lines), key=lambda note: note["time"])


def newest_of(store: FeatureStore) -> tuple[Snapshot, Contents]:
    """The newest snapshot and what it holds; of another one where reading it takes so long that it may expire."""
    while True:
        begun_s = time.monotonic()
        snapshot = store.snapshot()
        try:
            return snapshot, contents_of(snapshot)
        except CorruptFileError:
            if time.monotonic() - begun_s < GRACE_S:
                raise


class Actor:
    """One process at work. It notes each operation before it begins and when it has been told that it is done."""

    def __init__(self, store: FeatureStore, name: str, journal: Path) -> None:
        self.store = store
        self.name = name
        self.chance = random.Random(name)
        self._count = 0
        self._noted: set[int] | None = None  # manifests
        self._journals = journal.parent
        self._file = os.open(journal, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        self._last_read: tuple[int, Contents] | None = None

    def note(self, event: str, **fields: object) -> None:
        """One line of the journal, in one call; it outlives this process."""
        line = json.dumps({"time": time.monotonic_ns(), "event": event, "by": self.name, **fields})
        os.write(self._file, line.encode() + b"\n")

    def put(self, uris: Sequence[str]) -> None:
        name, text = self._begin("put", uris)
        self._done(text, self.store.put(rows_of(name, uris), text))

    def extract(self, uris: Sequence[str]) -> None:
        """What the pipeline does: two parts staged, shards built of them, one commit."""
        name, text = self._begin("put", uris)
        for part in range(2):
            self.store.stage_part(name, f"{part}", rows_of(name, uris[part::2]))
        built = {s: build_shard(self.store, name, s, ["0", "1"]) for s in range(self.store.info.num_shards)}
        self._done(text, self.store.commit({s: entry for s, entry in built.items() if entry}, text))
        self.store.discard_staging(name)

    def delete(self, uris: Sequence[str]) -> None:
        _, text = self._begin("delete", uris)
        self._done(text, self.store.delete(keys_of_uris(uris), text))

    def compact(self, force: bool = False) -> None:
        """Compact; another compaction may have been first."""
        with contextlib.suppress(CommitConflictError):
            compact(self.store, force=force, threads=1)

    def expire(self, keep_last: int) -> None:
        """Expire, by number alone; manifests are noted before they are gone for good."""
        if self._noted is None:  # by those who were here before
            self._noted = {note["version"] for note in notes_in(self._journals) if note["event"] == "manifest"}
        for manifest in manifests_of(self.store, self._noted):
            self.note("manifest", version=manifest.version, json=manifest.model_dump_json())
            self._noted.add(manifest.version)
        report = expire(self.store, keep_last=keep_last, keep_days=0, grace_days=GRACE_S / 86400)
        self.note("expired", num_files=report.num_files)

    def read(self) -> None:
        """Read the newest snapshot whole; noted where it is not what the last one was."""
        begun = time.monotonic_ns()
        snapshot, contents = newest_of(self.store)
        if self._last_read != (snapshot.version, contents):
            self._last_read = snapshot.version, contents
            self.note("read", begun=begun, version=snapshot.version, contents=list(contents.items()))

    def some_uris(self, pool: str, size: int) -> list[str]:
        """One to three uris of a pool of `size`."""
        return [f"{pool}{i}" for i in self.chance.sample(range(size), self.chance.randint(1, min(3, size)))]

    def _begin(self, verb: str, uris: Sequence[str]) -> tuple[str, str]:
        name = f"{self.name}.{self._count}"
        self._count += 1
        text = " ".join([verb, name, *uris])
        self.note("begin", operation=text)
        return name, text

    def _done(self, text: str, snapshot: Snapshot) -> None:
        self.note("done", operation=text, version=snapshot.version)


def act(url: str, name: str, notes: Path, work: Callable[[Actor], None]) -> None:
    """The life of a process of an arena, where nothing is patched yet: without the race at the first write."""
    store_module.refuse_unsafe = lambda storage: None
    actor = Actor(FeatureStore.open(url), name, notes / f"{name}.jsonl")
    try:
        work(actor)
    except BaseException:
        actor.note("failed", error=traceback.format_exc())
        raise


class Arena:
    """One store, the processes that work on it, and all that they noted."""

    context = SMALL

    def __init__(self, store: FeatureStore, folder: Path) -> None:
        self.store = store
        self.folder = folder
        self.processes: list[BaseProcess] = []
        self._manifests: dict[int, Manifest] = {}
        self._numbers = itertools.count()
        folder.mkdir(parents=True, exist_ok=True)

    def actor(self, name: str) -> Actor:
        """To act in this process."""
        return Actor(FeatureStore.open(self.store.url), name, self.folder / f"{name}.jsonl")

    def start(self, name: str, work: Callable[[Actor], None]) -> BaseProcess:
        """`work`, which can be pickled, in a small process of its own: without what the caller has patched."""
        process = small_process(act, self.store.url, name, self.folder, work, name=name)
        process.start()
        self.processes.append(process)
        return process

    def kill(self, process: BaseProcess) -> None:
        """SIGKILL, and wait until it is gone."""
        assert process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.join()

    def close(self) -> None:
        for process in self.processes:
            if process.is_alive():
                self.kill(process)

    def notes(self) -> list[dict]:
        """What all processes noted, by time."""
        return notes_in(self.folder)

    def history(self) -> list[Manifest]:
        """Every manifest that ever was, in order; without gaps."""
        self._manifests |= {manifest.version: manifest for manifest in manifests_of(self.store, self._manifests)}
        for note in self.notes():
            if note["event"] == "manifest" and note["version"] not in self._manifests:
                self._manifests[note["version"]] = Manifest.model_validate_json(note["json"])
        assert sorted(self._manifests) == list(range(1, len(self._manifests) + 1)), "versions have a gap"
        return [self._manifests[version] for version in sorted(self._manifests)]

    def failures(self) -> str:
        """What went wrong in the processes."""
        return "\n".join(f"{note['by']}: {note['error']}" for note in self.notes() if note["event"] == "failed")

    def check(self) -> list[Manifest]:
        """The history holds together, every acknowledgement was true, and every read saw a state of the history.

        Others may be at work: what was acknowledged is noted before the log is read, what was begun after it.
        """
        snapshot, contents = newest_of(self.store)
        notes = self.notes()
        assert not self.failures(), self.failures()
        manifests = self.history()
        begun = {note["operation"] for note in self.notes() if note["event"] == "begin"}
        check_chain(manifests)
        check_acknowledged(notes, begun, manifests)
        states = replay(manifests)
        assert contents == states[snapshot.version], f"snapshot {snapshot.version} is not the log's replay"
        for note in notes:
            if note["event"] == "read":
                read = dict(note["contents"])
                assert read == states[note["version"]], (
                    f"{note['by']} read a state that snapshot {note['version']} is not"
                )
        check_order(notes, manifests)
        return manifests


def check_chain(manifests: Sequence[Manifest]) -> None:
    """Versions in a row, each on its parent, each commit once, time never backwards."""
    assert [m.version for m in manifests] == list(range(1, len(manifests) + 1))
    assert len({m.commit_id for m in manifests}) == len(manifests), "a commit stands twice in the log"
    for before, after in itertools.pairwise(manifests):
        assert after.parent == before.commit_id, f"version {after.version} does not stand on {before.version}"
        assert after.time_s >= before.time_s, f"time runs backwards at version {after.version}"


def check_acknowledged(notes: Sequence[dict], begun: set[str], manifests: Sequence[Manifest]) -> None:
    """What was acknowledged is in the log where it was said to be; what is in the log was begun, and is there once."""
    in_log = [m.operation for m in manifests if m.operation.split()[0] in ("put", "delete")]
    assert len(set(in_log)) == len(in_log), "an operation was committed twice"
    assert begun.issuperset(in_log), "an operation that nobody began"
    for note in notes:
        if note["event"] == "done":
            there = note["version"] <= len(manifests) and manifests[note["version"] - 1].operation
            assert there == note["operation"], (
                f"version {note['version']} was acknowledged to {note['operation']}: {there}"
            )


def check_order(notes: Sequence[dict], manifests: Sequence[Manifest]) -> None:
    """What began after another was done comes after it, for reads and writes of all processes."""
    version_of = {m.operation: m.version for m in manifests}
    moments: list[tuple[int, bool, int, str]] = []  # when, whether it ends there, version, what
    for note in notes:
        if note["event"] == "begin" and note["operation"] in version_of:
            moments.append((note["time"], False, version_of[note["operation"]] - 1, note["operation"]))
        elif note["event"] == "read":
            moments.append((note["begun"], False, note["version"], f"read by {note['by']}"))
        if note["event"] in ("read", "done"):
            moments.append((note["time"], True, note["version"], ""))
    newest = 0
    for _, is_end, version, what in sorted(moments):
        if is_end:
            newest = max(newest, version)
        else:
            assert version >= newest, f"{what} saw {version} when {newest} was done"


@pytest.fixture(name="rows_of")
def rows_of_fixture() -> Callable[..., FeatureRows]:
    """Rows of an operation."""
    return rows_of


@pytest.fixture
def make_arena(tmp_path: Path, info: StoreInfo, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Arena]]:
    """Arenas around new stores, in a folder or at `url`; all of their processes end with the test."""
    arenas: list[Arena] = []
    monkeypatch.setattr(store_module, "refuse_unsafe", lambda storage: None)  # a race of seconds, tested elsewhere

    def make(url: str | Path | None = None, num_shards: int = 2) -> Arena:
        place = tmp_path / f"arena-{len(arenas)}"
        store = FeatureStore.create(url or place / "store", info.model_copy(update={"num_shards": num_shards}))
        arenas.append(Arena(store, place / "notes"))
        return arenas[-1]

    yield make
    for arena in arenas:
        arena.close()


def watched(fuse: Fuse, root: str, work: Callable[[], None]) -> None:
    fuse.watch_disk(root)
    work()


@pytest.fixture
def dies_at(tmp_path: Path) -> Callable[[int, Callable[[], None], str], bool]:
    """Do `work`, which can be pickled, in a process that dies at its n-th thing to do with files below a root: whether
    it did."""

    def run(at: int, work: Callable[[], None], root: str) -> bool:
        process = small_process(watched, Fuse(at, tmp_path / "trace"), root, work)
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0

    return run
