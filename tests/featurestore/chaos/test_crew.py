"""Many processes work on one store at once, killed or not: what each was told is true, no row is lost or half there.

Every row tells on itself: its source tag names the operation that wrote it, and its feature is a function of that name
and of its uri. A commit's text in the manifest says what it did. The order of all that many do at once is that of
simulated histories (tests/simulated/); here processes, disks and servers are real.
"""

import contextlib
import itertools
import random
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from featurestore import FeatureRows, FeatureStore, Snapshot, StoreInfo, key_of_uri, keys_of_uris, log, shard_of
from featurestore import store as store_module
from featurestore.commit import Commit
from featurestore.errors import CommitConflictError, CorruptFileError
from featurestore.upkeep.compaction import compact as compact_store
from featurestore.upkeep.expiry import expire as expire_store
from tests.faulty import faulty, preceded_by
from tests.featurestore.staged import build_shard
from tests.fuse import SMALL, small_process

MAX_S = 400
GRACE_S = 15.0
"""Of an expiry: what is older may go while somebody reads it."""
Contents = dict[str, str]  # by uri, the name of the operation that wrote it


def feature_of(name: str, uri: str) -> np.ndarray:
    """bfloat16 bits (8,), finite."""
    return np.frombuffer(xxhash.xxh3_128_digest(f"{name} {uri}".encode()), np.uint16) & np.uint16(0x3FFF)


def rows_of(name: str, uris: Sequence[str]) -> FeatureRows:
    """Rows of the operation `name`."""
    features = np.array([feature_of(name, uri) for uri in uris], np.uint16).reshape(-1, 8)
    return FeatureRows.of(uris, features, source_tags=[name] * len(uris))


def contents_of(snapshot: Snapshot) -> Contents:
    """What the snapshot holds. Fails on a row that is not what its operation wrote, or stands twice or astray."""
    found: Contents = {}
    for shard in range(snapshot.info.num_shards):
        rows = snapshot.read_shard(shard)
        assert (shard_of(rows.keys_N, snapshot.info.num_shards) == shard).all(), f"strays in shard {shard}"
        for key, uri, name, feature in zip(
            rows.keys_N.tolist(), rows.uris, rows.source_tag, rows.features_ND, strict=True
        ):
            assert uri not in found and key == key_of_uri(uri), f"{uri} stands twice, or under another key"
            assert np.array_equal(feature, feature_of(name, uri)), f"{uri} of {name} is not what was written"
            found[uri] = name
    return found


def newest_of(store: FeatureStore) -> tuple[Snapshot, Contents]:
    """The newest snapshot and what it holds; of another one where reading it takes so long that it may expire."""
    while True:
        begun_s, snapshot = time.monotonic(), store.snapshot()
        try:
            return snapshot, contents_of(snapshot)
        except CorruptFileError:
            if time.monotonic() - begun_s < GRACE_S:
                raise


def states_after(operations: Sequence[str], own: str = "") -> list[Contents]:
    """What the uris that begin with `own` hold after each operation, by the operations' texts; the first is nothing."""
    states: list[Contents] = [{}]
    for verb, name, *uris in map(str.split, operations):
        mine = {uri: name for uri in uris if uri.startswith(own)}
        others = {uri: by for uri, by in states[-1].items() if uri not in mine}
        states.append(others | mine if verb == "put" else others)
    return states


class Member:
    """One process at work. It notes each operation before it begins, and when it has been told that it is done."""

    def __init__(self, store: FeatureStore, name: str, folder: Path) -> None:
        self.store, self.name, self.folder = store, name, folder
        self.chance, self._numbers = random.Random(name), itertools.count()

    def put(self, uris: Sequence[str]) -> None:
        self._commit("put", uris, lambda name, text: self.store.put(rows_of(name, uris), text))

    def delete(self, uris: Sequence[str]) -> None:
        self._commit("delete", uris, lambda name, text: self.store.delete(keys_of_uris(uris), text))

    def extract(self, uris: Sequence[str]) -> None:
        """What the pipeline does: two parts staged, shards built of them, one commit."""

        def work(name: str, text: str) -> Snapshot:
            for part in range(2):
                self.store.stage_part(name, f"{part}", rows_of(name, uris[part::2]))
            built = {s: build_shard(self.store, name, s, ["0", "1"]) for s in range(self.store.info.num_shards)}
            snapshot = self.store.commit({s: entry for s, entry in built.items() if entry}, text)
            self.store.discard_staging(name)
            return snapshot

        self._commit("put", uris, work)

    def _commit(self, verb: str, uris: Sequence[str], work: Callable[[str, str], Snapshot]) -> None:
        name = f"{self.name}.{next(self._numbers)}"
        text = " ".join([verb, name, *uris])
        self._note(text)
        assert work(name, text).manifest.operation == text
        self._note("done")

    def _note(self, line: str) -> None:
        with (self.folder / f"{self.name}.notes").open("a") as file:
            file.write(f"{line}\n")


def write(me: Member, count: int | None = None, barrier: Any = None) -> None:
    """Write uris of its own and those of all in one commit, `count` times or without an end."""
    if barrier is not None:
        barrier.wait()
    for _ in itertools.repeat(None) if count is None else range(count):
        uris = [f"{pool}/{i}" for pool in (me.name, "hot") for i in me.chance.sample(range(6), me.chance.randint(1, 3))]
        me.chance.choice([me.put, me.put, me.extract, me.delete])(uris)


def read(me: Member) -> None:
    """Read the newest snapshot: all that its commit did is there, and none is older than the one before."""
    newest = 0
    while True:
        snapshot, contents = newest_of(me.store)
        assert snapshot.version >= newest
        newest = snapshot.version
        match snapshot.manifest.operation.split():
            case ["put", name, *uris]:
                assert {contents.get(uri) for uri in uris} == {name}, f"half of snapshot {newest}"
            case ["delete", _, *uris]:
                assert contents.keys().isdisjoint(uris), f"half of snapshot {newest}"
        time.sleep(0.02)


def compact(me: Member) -> None:
    while True:
        with contextlib.suppress(CommitConflictError):  # another compaction may have been first
            compact_store(me.store, threads=1)
        time.sleep(0.05)


def expire(me: Member) -> None:
    while True:
        if expire_store(me.store, keep_last=3, keep_days=0, grace_days=GRACE_S / 86400).num_files:
            (me.folder / "deleted").touch()
        time.sleep(0.05)


def act(url: str, name: str, folder: Path, work: Callable[[Member], None]) -> None:
    """The life of a process of a crew, where nothing is patched yet: without the race at the first write."""
    store_module.refuse_unsafe = lambda storage: None
    try:
        work(Member(FeatureStore.open(url), name, folder))
    except BaseException:
        (folder / f"{name}.failed").write_text(traceback.format_exc())
        raise


class Crew:
    """One store, the processes that work on it, and all that they noted."""

    def __init__(self, store: FeatureStore, folder: Path) -> None:
        self.store, self.folder = store, folder
        self._processes: dict[str, BaseProcess] = {}
        folder.mkdir(parents=True)

    def member(self, name: str, *, before_commit: Callable[[], object] | None = None, **calls: Any) -> Member:
        """To act in this process; something happens just before it creates its next manifest, calls may be faulty."""
        if before_commit is not None:
            calls["create_exclusive"] = preceded_by(before_commit)
        store = FeatureStore.open(self.store.url)
        return Member(faulty(store, **calls) if calls else store, name, self.folder)

    def start(self, name: str, work: Callable[[Member], None]) -> None:
        """Begin with `work`, which can be pickled, in a small process of its own."""
        self._processes[name] = small_process(act, self.store.url, name, self.folder, work)
        self._processes[name].start()

    def join(self, name: str) -> None:
        """Wait for the good end of a process."""
        process = self._processes.pop(name)
        process.join(MAX_S)
        assert process.exitcode == 0, self._failures()

    def kill(self, name: str) -> None:
        """Send SIGKILL to a process that is at work, and wait until it is gone."""
        self.check_at_work()
        process = self._processes.pop(name)
        process.kill()
        process.join()

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.join()

    def check_at_work(self) -> None:
        """No process has ended by itself."""
        assert all(process.is_alive() for process in self._processes.values()), self._failures()

    def operations(self) -> dict[str, list[str]]:
        """By writer, what it began. A line without an end is being written, or its writer died over it."""
        return {name: [line for line in lines if line != "done"] for name, lines in self._notes().items()}

    def check(self) -> None:
        """What each writer was told is there, and what it began after that is there whole or not at all."""
        notes, (_, contents), begun = self._notes(), newest_of(self.store), self.operations()
        for name, operations in begun.items():
            own = {uri: by for uri, by in contents.items() if uri.startswith(f"{name}/")}
            num_done = notes.get(name, []).count("done")
            assert own in states_after(operations, f"{name}/")[num_done:], f"{name}: {own} after {operations}"
        known = {text.split()[1] for operations in begun.values() for text in operations}
        assert known.issuperset(contents.values()), "rows of an operation that nobody began"

    def _notes(self) -> dict[str, list[str]]:
        return {path.stem: path.read_text().split("\n")[:-1] for path in self.folder.glob("*.notes")}

    def _failures(self) -> str:
        return "\n".join(f"{path.stem}: {path.read_text()}" for path in self.folder.glob("*.failed"))


@pytest.fixture
def make_crew(
    tmp_path: Path, info: StoreInfo, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str | None], Crew]]:
    """Makes a crew around a new store, in a folder or at `url`; all of its processes end with the test."""
    monkeypatch.setattr(store_module, "refuse_unsafe", lambda storage: None)  # a race of seconds, tested elsewhere
    with contextlib.ExitStack() as stack:

        def make(url: str | None = None) -> Crew:
            store = FeatureStore.create(url or tmp_path / "store", info.model_copy(update={"num_shards": 2}))
            return stack.enter_context(contextlib.closing(Crew(store, tmp_path / "notes")))

        yield make


@pytest.mark.parametrize("num_commits", [40, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_many_commits_of_eight_writers(make_crew: Callable[..., Crew], num_commits: int) -> None:
    """Each commit is in the log once, and the rows are those of all of them in its order."""
    crew, barrier = make_crew(), SMALL.Barrier(8)
    crew.start("reader", read)
    crew.start("compactor", compact)
    for number in range(8):
        crew.start(f"w{number}", partial(write, count=num_commits // 8, barrier=barrier))
    for number in range(8):
        crew.join(f"w{number}")
    while crew.store.snapshot().version == num_commits:
        crew.check_at_work()
        time.sleep(0.1)  # until there is a compaction; the test's own limit ends it
    for name in ("reader", "compactor"):
        crew.kill(name)
    crew.check()
    log_of = [log.read_manifest(crew.store.storage, version) for version in log.versions(crew.store.storage)]
    done = [manifest.operation for manifest in log_of if manifest.operation != "compact"]
    assert sorted(done) == sorted(text for texts in crew.operations().values() for text in texts)
    assert len(done) == len(set(done)) == num_commits
    assert contents_of(crew.store.snapshot()) == states_after(done)[-1]


ROLES = {"w0": write, "w1": write, "w2": write, "compactor": compact, "expirer": expire}
MANY = [pytest.param("disk", seed, 50, 0.2, marks=pytest.mark.slow) for seed in range(1, 11)]
MANY += [pytest.param("s3", seed, 50, 1.0, marks=pytest.mark.slow) for seed in range(1, 11)]


@pytest.mark.parametrize(("place", "seed", "num_kills", "pause_s"), [("disk", 0, len(ROLES), 0.1), *MANY])
def test_kills_of_each_at_random_moments(
    make_crew: Callable[..., Crew],
    request: pytest.FixtureRequest,
    place: str,
    seed: int,
    num_kills: int,
    pause_s: float,
) -> None:
    """One after the other, in a random order, each after a new commit; a reader looks on all the time."""
    crew = make_crew(f"{request.getfixturevalue('s3_url')}/store" if place == "s3" else None)
    chance, before = random.Random(seed), 0
    crew.start("reader", read)
    names = {role: f"{role}-0" for role in ROLES}
    for role, name in names.items():
        crew.start(name, ROLES[role])
    victims = [role for _ in range(0, num_kills, len(ROLES)) for role in chance.sample(list(ROLES), len(ROLES))]
    for number, role in enumerate(victims, 1):
        while (newest := crew.store.snapshot().version) == before:  # on a busy machine too, work goes on between kills
            crew.check_at_work()
            time.sleep(0.01)
        time.sleep(chance.uniform(0, pause_s))
        crew.kill(names[role])
        crew.check()
        before, names[role] = newest, f"{role}-{number}"
        crew.start(names[role], ROLES[role])
    crew.check_at_work()
    crew.close()
    crew.check()
    assert num_kills == len(ROLES) or (crew.folder / "deleted").exists()


@pytest.fixture
def crew(make_crew: Callable[..., Crew]) -> Crew:
    made = make_crew()
    made.member("before").put(["before/0", "before/1", "before/2", "hot/0"])
    return made


def test_it_passes_a_store_that_is_sound(crew: Crew) -> None:
    quick = crew.member("quick")
    crew.member("slow", before_commit=lambda: quick.put(["quick/0"])).put(["slow/0"])
    slow = crew.member("compactor", before_commit=lambda: quick.put(["quick/1"]))
    compact_store(slow.store, force=True)
    crew.check()
    assert crew.store.snapshot().version == 5


def test_a_create_that_overwrites_is_noticed(crew: Crew) -> None:
    quick = crew.member("quick")

    def overwriting(create: object, path: str, data: bytes) -> bool:
        quick.put(["quick/0"])
        crew.store.storage.write_bytes(path, data)
        return True

    crew.member("slow", create_exclusive=overwriting).put(["slow/0"])
    with pytest.raises(AssertionError, match=r"quick: .* after"):
        crew.check()


def test_a_compaction_that_forgets_what_came_meanwhile_is_noticed(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    quick, onto = crew.member("quick"), Commit.onto
    quick.put(["before/1", "quick/0"])
    monkeypatch.setattr(Commit, "onto", lambda self, parent: onto(self, parent) | (self.replaces and self.entries))
    slow = crew.member("compactor", before_commit=lambda: quick.put([f"quick/{i}" for i in range(6)]))
    compact_store(slow.store, force=True)
    with pytest.raises(AssertionError, match=r"quick: .* after"):
        crew.check()
