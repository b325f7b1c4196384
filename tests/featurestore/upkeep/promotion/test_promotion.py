"""Gates between channels: what each measures, what fails, what moves, and what is kept of it, on disk and S3."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from featurestore import FeatureRows, FeatureStore, QuarantineRow, StoreInfo, to_bits
from featurestore.__main__ import app
from featurestore.errors import ChannelError, CommitConflictError, InvalidRowsError
from featurestore.snapshot import Snapshot
from featurestore.upkeep.history import move_channel
from featurestore.upkeep.promotion import (
    Decision,
    GateLimits,
    GateResult,
    coverage,
    drift,
    neighbours,
    promote,
    quarantine,
    read_decisions,
    read_limits,
)
from featurestore.upkeep.purge import read_keys, read_names, read_uris

NUM = 400


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def rows_of(info: StoreInfo, values_ND: np.ndarray, first: int = 0) -> FeatureRows:
    names = [f"images/{first + n}.jpg" for n in range(len(values_ND))]
    return FeatureRows.of(names, to_bits(values_ND.astype(np.float32), info.dtype))


def drawn(seed: int, count: int = NUM) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 8)).astype(np.float32)


@pytest.fixture
def two(store: FeatureStore) -> FeatureStore:
    """Stable at 1 with 400 rows; candidate at 2 with ten more."""
    store.put(rows_of(store.info, drawn(0)))
    store.put(rows_of(store.info, drawn(1, 10), NUM))
    move_channel(store, "stable", 1)
    move_channel(store, "candidate", 2)
    return store


class TestEachGate:
    def test_coverage_of_stable_and_of_keys(self, two: FeatureStore) -> None:
        gone = two.snapshot(1).keys()[:8]
        after = two.delete(gone)
        found = coverage(after, two.snapshot(1), None, GateLimits())
        assert found.value == pytest.approx(1 - 8 / NUM) and not found.holds
        assert coverage(after, two.snapshot(1), None, GateLimits(min_coverage=0.97)).holds
        asked = coverage(after, None, np.append(gone[:1], two.snapshot(1).keys()[8:17]), GateLimits())
        assert asked.value == pytest.approx(0.9) and "9 of 10 keys asked for" in asked.text
        assert coverage(two.snapshot(0), None, None, GateLimits()).value == 0.0

    def test_quarantine(self, two: FeatureStore) -> None:
        assert quarantine(two, two.snapshot(), GateLimits()).holds
        two.add_quarantine([QuarantineRow(n, f"bad/{n}.jpg", "truncated", 0.0) for n in range(5)])
        found = quarantine(two, two.snapshot(), GateLimits())
        assert found.value == pytest.approx(5 / 415) and not found.holds

    def test_drift_names_the_dimension_that_moved(self, two: FeatureStore) -> None:
        values = drawn(0)
        values[:, 3] += 0.5
        shifted = two.put(rows_of(two.info, values))
        found = drift(shifted, two.snapshot(1), GateLimits())
        deviations = two.snapshot(1).statistics().std_D
        deviation = max(float(deviations[3]), float(deviations.mean()))
        moved = (shifted.statistics().mean_D - two.snapshot(1).statistics().mean_D)[3]
        assert not found.holds and found.text == "mean of dimension 3 of 8 moved most"
        assert found.value == pytest.approx(abs(moved) / deviation, rel=1e-5) and found.value > 0.4
        values = drawn(0)
        values[:, 5] *= 1.5
        wider = drift(two.put(rows_of(two.info, values)), two.snapshot(1), GateLimits())
        assert not wider.holds and wider.text == "standard deviation of dimension 5 of 8 moved most"
        assert drift(two.snapshot(2), two.snapshot(1), GateLimits()).holds

    def test_one_image_that_makes_a_quiet_unit_fire_is_no_drift(self, store: FeatureStore) -> None:
        values = drawn(0)
        values[:, 6] = 0
        values[7, 6] = 1
        store.put(rows_of(store.info, values))
        found = drift(store.put(rows_of(store.info, np.ones((1, 8)), NUM)), store.snapshot(1), GateLimits())
        assert found.value is not None and found.value < 0.05
        assert (
            drift(store.put(rows_of(store.info, np.ones((300, 8)), NUM)), store.snapshot(1), GateLimits()).value > 0.4
        )

    def test_neighbours_against_a_plain_loop(self, two: FeatureStore) -> None:
        values = drawn(0)
        values[:40] = drawn(7, 40)
        after = two.put(rows_of(two.info, values))
        limits = GateLimits(num_neighbours=5, num_rows=4 * NUM, num_queries=NUM)
        found = neighbours(after, two.snapshot(1), limits)

        def near(snapshot: Snapshot) -> list[set[int]]:
            keys = two.snapshot(1).keys()
            rows = snapshot.codec.decode(snapshot.get(keys)).astype(np.float64)
            apart = ((rows[:, None] - rows[None]) ** 2).sum(axis=2)
            np.fill_diagonal(apart, np.inf)
            return [set(np.argsort(each)[:5].tolist()) for each in apart]

        kept = [len(old & new) / 5 for old, new in zip(near(two.snapshot(1)), near(after), strict=True)]
        assert found.value == pytest.approx(np.mean(kept), abs=1e-9)
        assert not found.holds and 0.5 < found.value < 0.9
        assert neighbours(two.snapshot(2), two.snapshot(1), limits).value == 1.0
        assert neighbours(after, two.snapshot(1), limits) == found  # one draw for one seed

    def test_neighbours_of_other_features_are_those_of_chance(self, two: FeatureStore) -> None:
        other = two.put(rows_of(two.info, drawn(9)))
        found = neighbours(other, two.snapshot(1), GateLimits())
        assert found.value is not None and found.value < 0.06 and not found.holds

    def test_what_cannot_be_compared_fails(self, two: FeatureStore) -> None:
        few = two.delete(two.snapshot().keys()[5:])
        found = neighbours(few, two.snapshot(1), GateLimits())
        assert (found.value, found.holds) == (None, False) and "too few" in found.text


class PromotionContract:
    """What holds on every storage."""

    @pytest.fixture
    def filled(self, url: str, info: StoreInfo) -> FeatureStore:
        store = FeatureStore.create(url, info)
        store.put(rows_of(info, drawn(0)))
        move_channel(store, "candidate", 1)
        return store

    def test_days_of_a_store(self, filled: FeatureStore) -> None:
        first = promote(filled, "candidate", "stable", GateLimits())
        assert (first.holds, first.before, first.number) == (True, None, 1)
        assert filled.snapshot("stable").version == 1
        again = promote(filled, "candidate", "stable", GateLimits())
        assert again.is_there and again.number == 0
        filled.put(rows_of(filled.info, drawn(3)))
        move_channel(filled, "candidate", 2)
        bad = promote(filled, "candidate", "stable", GateLimits())
        assert not bad.moves and [result.gate for result in bad.results if not result.holds] == ["neighbours"]
        assert filled.snapshot("stable").version == 1
        forced = promote(filled, "candidate", "stable", GateLimits(), force="a new network of the camera")
        assert forced.moves and not forced.holds and filled.snapshot("stable").version == 2
        kept = read_decisions(filled.storage, "stable")
        assert [decision.number for decision in kept] == [1, 2, 3]
        assert [decision.moves for decision in kept] == [True, False, True]
        assert kept[2].forced == "a new network of the camera" and kept[1] == bad


class TestOnDisk(PromotionContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return str(tmp_path / "store")


class TestOnS3(PromotionContract):
    @pytest.fixture
    def url(self, s3_url: str) -> str:
        return f"{s3_url}/features"


class TestPromote:
    def test_a_dry_run_keeps_nothing(self, two: FeatureStore) -> None:
        decision = promote(two, "candidate", "stable", GateLimits(), dry_run=True)
        assert decision.moves and two.snapshot("stable").version == 1
        assert read_decisions(two.storage, "stable") == []

    def test_a_channel_that_was_moved_meanwhile_stays_where_the_other_put_it(self, two: FeatureStore) -> None:
        three = two.put(rows_of(two.info, drawn(2, 3), 900)).version

        def meanwhile(candidate: Snapshot, stable: Snapshot | None) -> GateResult:
            move_channel(two, "stable", three)
            return GateResult(gate="slow", value=1.0, limit=1.0, holds=True, text="takes hours")

        with pytest.raises(CommitConflictError, match="another writer was first"):
            promote(two, "candidate", "stable", GateLimits(), more=[meanwhile])
        assert two.snapshot("stable").version == three

    def test_a_gate_of_the_caller_counts(self, two: FeatureStore) -> None:
        seen = []

        def gate(candidate: Snapshot, stable: Snapshot | None) -> GateResult:
            seen.append((candidate.version, stable.version if stable else None))
            return GateResult(gate="gauc", value=-0.01, limit=-0.001, holds=False, text="of 9 impressions")

        decision: Decision = promote(two, "candidate", "stable", GateLimits(), more=[gate])
        assert seen == [(2, 1)] and not decision.moves and two.snapshot("stable").version == 1

    def test_a_channel_that_is_not_there_is_named(self, two: FeatureStore) -> None:
        with pytest.raises(ChannelError, match="no channel 'tested'; it has candidate, stable"):
            promote(two, "tested", "stable", GateLimits())
        with pytest.raises(ChannelError, match="no name of a channel"):
            promote(two, "candidate", "19", GateLimits())


class TestCommand:
    def test_it_moves_or_stays_and_says_why(self, two: FeatureStore, tmp_path: Path) -> None:
        result = run("promote", two.url, "--max-drift", 0.0, "--json", tmp_path / "decision.json")
        assert result.exit_code == 1
        told = [line for line in result.output.splitlines() if line.startswith("error: ")]
        assert len(told) == 1 and told[0].startswith("error: gate drift: 0.") and "limit 0:" in told[0]
        assert "stable stays at snapshot 1" in result.output and two.snapshot("stable").version == 1
        written = json.loads((tmp_path / "decision.json").read_text())
        assert written["holds"] is False and written["results"][2]["gate"] == "drift"
        limits = tmp_path / "gates.yaml"
        limits.write_text("max_drift: 0.5\nmin_neighbours: 0.8\n")
        done = run("promote", two.url, "--from", "candidate", "--to", "stable", "--gates", limits)
        assert done.exit_code == 0 and "stable points to snapshot 2, decision 2" in done.output
        assert "nothing to do" in run("promote", two.url).output
        shown = run("channel", two.url, "stable").output
        assert "promoted from candidate (decision 2)" in shown

    def test_keys_that_have_to_be_there(self, two: FeatureStore, tmp_path: Path) -> None:
        file = tmp_path / "ads.txt"
        file.write_text("".join(f"images/{n}.jpg\n" for n in range(NUM + 5, NUM + 15)))
        result = run("promote", two.url, "--keys", file)
        assert result.exit_code == 1 and "gate coverage: 0.5, limit 0.99: 5 of 10 keys asked for" in result.output
        forced = run("promote", two.url, "--keys", file, "--force", "the ads come tomorrow")
        assert forced.exit_code == 0 and "by --force, though gates fail: the ads come tomorrow" in forced.output
        assert two.snapshot("stable").version == 2


class TestFiles:
    def test_limits(self, tmp_path: Path) -> None:
        file = tmp_path / "gates.yaml"
        file.write_text("max_drift: 0.5\n")
        assert read_limits(file) == GateLimits(max_drift=0.5)
        file.write_text("")
        assert read_limits(file) == GateLimits()
        for text in ("max_drif: 1", "max_drift: -1", "[1]", "max_drift: {"):
            file.write_text(text)
            with pytest.raises(InvalidRowsError, match=r"gates\.yaml"):
                read_limits(file)

    def test_keys_and_uris(self, tmp_path: Path) -> None:
        file = tmp_path / "names.txt"
        file.write_text("5\n-3\n\n5\n")
        assert read_keys(file).tolist() == [-3, 5] and read_names(file)[1] == []
        file.write_text("a.jpg\n5\na.jpg\n")
        assert read_uris(file) == ["a.jpg", "5"] and read_names(file)[1] == ["a.jpg", "5"]
        np.save(tmp_path / "keys.npy", np.array([4, 4, 2]))
        assert read_names(tmp_path / "keys.npy")[0].tolist() == [2, 4]
        for text in ("", "x\n", "1.5\n", f"{2**63}\n"):
            file.write_text(text)
            with pytest.raises(InvalidRowsError, match=r"names\.txt"):
                read_keys(file)
