"""A random machine of commits against a dict: every snapshot, old ones too, holds what the dict held."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from featurestore import ExtractorSpec, FeaturePartition, FeatureRows, FeatureStore, StoreInfo, key_of_uri

URIS = st.lists(st.sampled_from([f"u{i}" for i in range(12)]), max_size=6)
Contents = dict[int, tuple[int, ...]]


class StoreMachine(RuleBasedStateMachine):
    @initialize(log2=st.integers(0, 3), ranks=st.integers(1, 5))
    def make(self, log2: int, ranks: int) -> None:
        spec = ExtractorSpec(backbone="b", layer="l", weights_digest="w", preprocessing="p", compute_dtype="float32")
        self.folder = tempfile.TemporaryDirectory()
        info = StoreInfo(dim=3, num_shards=1 << log2, dtype="float32", extractor=spec)
        self.store = FeatureStore.create(Path(self.folder.name) / "store", info)
        self.ranks = ranks
        self.model: Contents = {}
        self.past: dict[int, Contents] = {0: {}}
        self.staged = 0
        self.value = 0

    def rows(self, uris: list[str]) -> FeatureRows:
        values = np.arange(self.value, self.value + 3 * len(uris), dtype=np.float32).reshape(-1, 3)
        self.value += 3 * len(uris)
        return FeatureRows.of(uris, values)

    def learn(self, rows: FeatureRows) -> None:
        self.model.update(zip(rows.keys_N.tolist(), map(tuple, rows.features_ND.tolist()), strict=True))

    def committed(self, version: int) -> None:
        assert version == max(self.past) + 1
        self.past[version] = dict(self.model)

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
        built = {s: self.store.build_shard(run, s, names) for s in range(self.store.info.num_shards)}
        self.committed(self.store.commit({s: e for s, e in built.items() if e}, "extract").version)
        self.store.discard_staging(run)

    @invariant()
    def snapshots_hold_what_the_dict_held(self) -> None:
        newest = max(self.past)
        for version in {newest, newest // 2}:
            contents = self.past[version]
            snapshot = self.store.snapshot(version)
            assert snapshot.keys().tolist() == sorted(contents)
            assert list(map(tuple, snapshot.get(sorted(contents)).tolist())) == [contents[k] for k in sorted(contents)]
            assert snapshot.num_rows == snapshot.metadata_table().num_rows == len(contents)

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
                for key, row, missing in zip(mine.tolist(), found.features_UD, found.missing_U, strict=True):
                    if missing:
                        assert not row.any()
                    else:
                        served[key] = tuple(row.tolist())
        assert served == self.model

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


StoreMachine.TestCase.settings = settings(
    max_examples=12, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck)
)
test_random_commits_against_a_dict = StoreMachine.TestCase
