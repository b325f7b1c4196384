"""A random machine against a dict: every snapshot that is kept has what the dict had.

On a disk, where writers die too, in memory and on S3; for stores of every dtype, of one shard and of several.
What pins, channels and readers hold: tests/simulated.
"""

import signal
import tempfile
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from featurestore import FeaturePartition, FeatureRows, FeatureStore, Snapshot, key_of_uri
from featurestore import log as manifests
from featurestore.errors import SnapshotNotFoundError
from featurestore.problems import Problem
from featurestore.text import DType
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import expire
from featurestore.upkeep.history import diff, restore
from featurestore.upkeep.verify import verify
from tests.featurestore.conftest import INFO
from tests.featurestore.contents import days_later, metadata_of
from tests.fuse import Fuse, small_process
from tests.raised import raises

URIS = st.lists(st.sampled_from([f"u{i}" for i in range(12)]), max_size=6)
Contents = dict[int, tuple[int, ...]]
Kill = Callable[[int, Callable[[], None], str], None]


def expire_soon(store: FeatureStore, keep_last: int) -> None:
    expire(store, keep_last=keep_last, keep_days=0, grace_days=7)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self, dies_at: Kill | None, url: str = "") -> None:
        """`dies_at` None: no writer dies."""
        super().__init__()
        self.dies_at = dies_at
        self.folder = tempfile.TemporaryDirectory()
        self.url = f"{url or self.folder.name}/{uuid.uuid4().hex}"

    @initialize(log2=st.integers(0, 2), ranks=st.integers(1, 5), dtype=st.sampled_from(get_args(DType)))
    def make(self, log2: int, ranks: int, dtype: DType) -> None:
        info = INFO.model_copy(update={"dim": 3, "num_shards": 1 << log2, "dtype": dtype})
        self.store = FeatureStore.create(self.url, info)
        self.ranks = ranks
        self.model: Contents = {}
        self.past: dict[int, Contents] = {0: {}}  # every snapshot ever
        self.kept = {0}
        self.width_of: dict[tuple[int, ...], int] = {}  # of the image, by its feature
        self.staged = 0
        self.value = 0

    def rows(self, uris: list[str]) -> FeatureRows:
        number_ND = np.arange(self.value, self.value + 3 * len(uris)).reshape(-1, 3)  # no two rows are alike
        widths = number_ND[:, 0] + 1
        self.value += 3 * len(uris)
        dtype = self.store.info.storage_dtype
        features_ND = number_ND.astype(dtype) if dtype == np.float32 else (number_ND + 0x3C00).astype("u2").view(dtype)
        rows = FeatureRows.of(uris, features_ND, widths=widths)
        self.width_of.update(zip(map(tuple, rows.features_ND.tolist()), widths.tolist(), strict=True))
        return rows

    def learn(self, rows: FeatureRows) -> None:
        self.model.update(zip(rows.keys_N.tolist(), map(tuple, rows.features_ND.tolist()), strict=True))

    def committed(self, version: int) -> None:
        assert version == max(self.past) + 1
        self.past[version] = dict(self.model)
        self.kept.add(version)

    @rule(uris=URIS)
    def put(self, uris: list[str]) -> None:
        rows = self.rows(uris)
        self.learn(rows)
        self.committed(self.store.put(rows).version)

    @rule(uris=URIS)
    def delete(self, uris: list[str]) -> None:
        keys = [key_of_uri(uri) for uri in uris]
        for key in keys:
            self.model.pop(key, None)
        self.committed(self.store.delete(keys).version)

    @rule(parts=st.lists(URIS, max_size=3))
    def extract(self, parts: list[list[str]]) -> None:
        self.staged += 1
        run = f"run-{self.staged}"
        for number, uris in enumerate(parts):
            rows = self.rows(uris)
            self.learn(rows)
            self.store.stage_part(run, f"{number}", rows)
        names = self.store.staged_parts(run)
        built = self.store.build_shards(run, range(self.store.info.num_shards), names)
        self.committed(self.store.commit(built, "extract").version)
        self.store.discard_staging(run)

    def writers_die(self) -> bool:
        return self.dies_at is not None

    def work_and_die(self, at: int, work: Callable[[], None]) -> bool:
        """Whether its commit was made before."""
        assert self.dies_at is not None
        self.dies_at(at, work, self.store.url)
        return self.store.snapshot().version > max(self.past)

    @precondition(writers_die)
    @rule(uris=URIS, at=st.integers(1, 60))
    def put_and_die(self, uris: list[str], at: int) -> None:
        rows = self.rows(uris)
        if self.work_and_die(at, partial(self.store.put, rows)):
            self.learn(rows)
            self.committed(max(self.past) + 1)

    @rule(force=st.booleans())
    def compact(self, force: bool) -> None:
        compact(self.store, force=force)
        newest = self.store.snapshot()
        if newest.version > max(self.past):
            self.committed(newest.version)
        if force:
            assert all(len(files) <= 1 and not files[0].num_deleted for files in newest.manifest.shards.values())

    @precondition(writers_die)
    @rule(at=st.integers(1, 60))
    def compact_and_die(self, at: int) -> None:
        if self.work_and_die(at, partial(compact, self.store, force=True)):
            self.committed(max(self.past) + 1)

    @rule(back=st.integers(0, 5))
    def restore(self, back: int) -> None:
        version = max(self.past) - back
        if version in self.kept:
            self.model = dict(self.past[version])
            self.committed(restore(self.store, version).version)
        else:
            problem = Problem.EXPIRED if version >= 0 else Problem.NEGATIVE_VERSION
            with raises(SnapshotNotFoundError, problem, value=version):
                restore(self.store, version)

    @rule(back=st.integers(0, 5), ahead=st.integers(0, 5))
    def diff(self, back: int, ahead: int) -> None:
        versions = sorted(self.kept)
        before, after = (versions[max(0, len(versions) - 1 - place)] for place in (back, ahead))
        old, new, found = self.past[before], self.past[after], diff(self.store, before, after)
        assert set(found.added.keys_N.tolist()) == set(new) - set(old)
        assert set(found.removed.keys_N.tolist()) == set(old) - set(new)
        assert set(found.changed.keys_N.tolist()) == {key for key in set(old) & set(new) if old[key] != new[key]}

    @rule(keep_last=st.integers(1, 4), at=st.none() | st.integers(1, 40))
    def expire_soon(self, keep_last: int, at: int | None) -> None:
        if at is not None and self.dies_at is not None:
            self.dies_at(at, partial(expire_soon, self.store, keep_last), self.store.url)
        expire_soon(self.store, keep_last)
        self.kept &= {0, *sorted(self.past)[-keep_last:]}

    @rule(keep_last=st.integers(1, 4))
    def expire_late(self, keep_last: int) -> None:
        """All is old: what no kept snapshot names is gone, whoever left it behind; without any the log may be lost."""
        before = self.files("data/")
        with days_later(30):
            expire_soon(self.store, keep_last)
            expire_soon(self.store, keep_last)
        self.kept &= {0, *sorted(self.past)[-keep_last:]}
        named = [e.path for v in self.kept for files in self.store.snapshot(v).manifest.shards.values() for e in files]
        assert self.files("staging/") == []
        assert self.files("data/") == (sorted(set(named)) if self.kept != {0} else before)

    def files(self, folder: str) -> list[str]:
        paths = (entry.path for entry in self.store.storage.entries(""))
        return sorted(path for path in paths if path.startswith(folder) and path.endswith(".parquet"))

    @invariant()
    def snapshots_hold_what_the_dict_held(self) -> None:
        newest, oldest = max(self.kept), min(self.kept - {0}, default=0)
        assert self.store.snapshot().version == newest
        for version in (newest, oldest):
            self.check(self.store.snapshot(version))

    def check(self, snapshot: Snapshot) -> None:
        contents = self.past[snapshot.version]
        assert snapshot.keys().tolist() == sorted(contents)
        assert list(map(tuple, snapshot.get(sorted(contents)).tolist())) == [contents[k] for k in sorted(contents)]
        table = metadata_of(snapshot)
        assert snapshot.num_rows == table.num_rows == len(contents)
        for key, uri, width in zip(*(table[name].to_pylist() for name in ("key", "uri", "width")), strict=True):
            assert key == key_of_uri(uri) and width == self.width_of[contents[key]]

    @rule()
    def statistics_are_those_of_the_live_rows(self) -> None:
        live = self.store.codec.decode(self.store.snapshot().get(sorted(self.model))).astype(np.float64)
        found = self.store.snapshot().statistics()
        assert found.count == len(live)
        if len(live):
            np.testing.assert_allclose(found.mean_D, live.mean(axis=0), rtol=1e-6, atol=0)
            np.testing.assert_allclose(found.std_D, live.std(axis=0), rtol=1e-5, atol=0)

    @rule(back=st.integers(0, 5))
    def open_by_number(self, back: int) -> None:
        assert manifests.versions(self.store.storage) == sorted(self.kept - {0})
        version = max(0, max(self.past) - back)
        if version not in self.kept:
            with raises(SnapshotNotFoundError, Problem.EXPIRED, where=self.store.url, value=version):
                self.store.snapshot(version)
        elif version:
            self.check(self.store.snapshot(version))

    @rule()
    def partitions_serve_the_same(self) -> None:
        wanted = np.array([key_of_uri(f"u{i}") for i in range(14)])
        served: Contents = {}
        for rank in range(self.ranks):
            with FeaturePartition.load(self.store, rank, self.ranks, f"{self.folder.name}/cache", "zeros") as partition:
                assert partition.snapshot_version == max(self.past)
                mine = wanted[partition.owns(wanted)]
                found = partition.lookup(mine)
                assert partition.missing_count == int(found.missing_U.sum())
                assert not found.features_UD[found.missing_U].any()
                there = zip(mine.tolist(), found.features_UD.tolist(), found.missing_U, strict=True)
                served |= {key: tuple(row) for key, row, missing in there if not missing}
        assert served == self.model

    def teardown(self) -> None:
        if hasattr(self, "store"):
            assert verify(self.store).problems == []
        self.folder.cleanup()


def watched(fuse: Fuse, root: str, work: Callable[[], None]) -> None:
    fuse.watch_disk(root)
    work()


@pytest.fixture
def dies_at(tmp_path: Path) -> Kill:
    """Do `work`, which can be pickled, in a process that dies at its n-th thing to do with files below a root."""

    def run(at: int, work: Callable[[], None], root: str) -> None:
        process = small_process(watched, Fuse(at, tmp_path / "trace"), root, work)
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)

    return run


MANY = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("place", "examples", "steps"),
    [
        ("dies_at", 6, 12), pytest.param("memory_url", 8, 20, marks=pytest.mark.long), ("s3_url", 2, 15),
        *(pytest.param(place, 80, 25, marks=MANY) for place in ("dies_at", "memory_url", "s3_url")),
    ],
)  # fmt: skip
def test_random_commits_against_a_dict(
    place: str, examples: int, steps: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featurestore.store.refuse_unsafe", lambda storage: None)
    monkeypatch.setattr("featurestore.format.datafile.BLOCK_BYTES", 16)  # of a few rows each
    made = request.getfixturevalue(place)
    bounds = {"max_examples": examples, "stateful_step_count": steps, "suppress_health_check": list(HealthCheck)}
    run_state_machine_as_test(
        lambda: StoreMachine(made) if place == "dies_at" else StoreMachine(None, made),
        settings=settings(**bounds, deadline=None),
    )
