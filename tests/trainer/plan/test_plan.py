"""The plan: costs by hand, unique keys beside real draws, the paper's table 1, and the command on small data."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from featurestore.keys import owner_of, shard_of
from featurestore.spec import ExtractorSpec, StoreInfo
from featurestore.store import FeatureStore
from trainer.comm import SoloComm
from trainer.config.config import load_config
from trainer.errors import ConfigError, PlanError
from trainer.plan import calibrate, standin
from trainer.plan.__main__ import app
from trainer.plan.build import Row, Stored, advise, build, even_shards
from trainer.plan.cost import (
    DESIGNS,
    BatchCounts,
    Design,
    Keys,
    Machine,
    Network,
    Piece,
    Rates,
    StepCost,
    Widths,
    bytes_by_part,
    decoded_samples,
    step_cost,
)
from trainer.plan.draws import Drawn, drawn_keys, population
from trainer.plan.growth import Curve, Point, expected_unique, fit
from trainer.plan.inputs import PAPER, bytes_per_s, load_input
from trainer.plan.paper import plan_input
from trainer.plan.rates import Measured, Timed, line
from trainer.plan.sample import Question, sample
from trainer.plan.skew import highest_of, owner_skew
from trainer.samples.batch import Batch, Jagged
from trainer.samples.columns import decode
from trainer.samples.reader import SampleReader, open_index
from trainer.schema import load_schema

Places = Any

COUNTS = BatchCounts(
    samples=1000,
    ranks=4,
    decoded=300.0,
    images=Keys(references=8000, asked=1000, served=1100, unique=2000, owned=600),
    ids=Keys(references=9000, asked=2000, served=2200, unique=5000, owned=1300),
)
WIDTHS = Widths(feature_bytes=8192, image_vector_bytes=48, id_vector_bytes=48.0, dense_bytes=4_000_000)
RATES = Rates(
    read=Piece(0.0, 1e-5),
    route=Piece(0.001, 2e-6),
    gather=Piece(0.0, 1e-6),
    embed=Piece(0.01, 2e-5),
    worker=Piece(0.002, 1e-5),
    rows=Piece(0.0, 1e-7),
)
NETWORK = Network(call_s=1e-3, latency_s=1e-4, link_bytes_per_s=1e9, local_bytes_per_s=5e9)
MACHINE = Machine(RATES, NETWORK, cores=8)


class TestCost:
    def test_bytes_of_each_design(self) -> None:
        ours = bytes_by_part("exchange", COUNTS, WIDTHS)
        away = 0.75  # a quarter of a rank's keys are its own
        assert ours == {
            "keys": 8 * away * 3000,
            "id vectors": 48 * away * 2000,
            "id gradients": 48 * away * 2000,
            "dense gradients": 1.5 * 4_000_000,
            "image vectors": 48 * away * 1000,
            "image gradients": 48 * away * 1000,
        }
        server = bytes_by_part("store in server", COUNTS, WIDTHS)
        assert server["features"] == 8192 * away * 1000
        assert "image vectors" not in server
        worker = bytes_by_part("store in worker", COUNTS, WIDTHS)
        assert worker["samples"] == 8192 * 8000 / 4
        assert worker["keys"] == 8 * away * 2000

    def test_step_is_the_longest_lane(self) -> None:
        cost = step_cost("exchange", COUNTS, WIDTHS, MACHINE)
        embed, worker, rows = 0.01 + 600 * 2e-5, 0.002 + 250 * 1e-5, 1300 * 1e-7
        # Vectors and gradients: three messages, 10 % more than the mean out of the busiest owner.
        vectors = 1e-3 + 3 * 1e-4 + 1.1 * (48 * 0.75 * 1000 + 48 * 0.75 * 2000) / 1e9
        dense = 1e-3 + 6 * 1e-4 + 6e6 / 1e9
        assert cost.seconds == pytest.approx(embed + worker + rows + 2 * vectors + dense)
        assert cost.samples_per_s == pytest.approx(1000 / cost.seconds)
        assert cost.stages["keys"].seconds == pytest.approx(1e-3 + 3e-4 + 1.1 * 8 * 0.75 * 3000 / 1e9)
        slow_reader = dataclasses.replace(RATES, read=Piece(0.0, 1e-3))
        assert step_cost("exchange", COUNTS, WIDTHS, dataclasses.replace(MACHINE, rates=slow_reader)).seconds == 0.3

    def test_ranks_of_a_machine_share_its_cores_and_its_link(self) -> None:
        crowded = dataclasses.replace(
            MACHINE, cores=1, network=dataclasses.replace(NETWORK, ranks_per_machine=4), rates=RATES
        )
        cost = step_cost("exchange", COUNTS, WIDTHS, crowded)
        busy = sum(stage.busy_s for stage in cost.stages.values())
        assert cost.seconds == pytest.approx(4 * busy)
        assert cost.stages["dense gradients"].seconds == pytest.approx(1e-3 + 6e6 / 5e9)  # no latency inside a machine
        two = dataclasses.replace(NETWORK, ranks_per_machine=2)
        # Two thirds of what a rank sends leave the machine, over half of its link.
        assert two.alltoall_s(4, 3e6) == pytest.approx(1e-3 + 3 * 1e-4 + 2e6 / 0.5e9 + 1e6 / 5e9)

    def test_one_rank_has_no_wire(self) -> None:
        alone = dataclasses.replace(COUNTS, ranks=1)
        cost = step_cost("exchange", alone, WIDTHS, MACHINE)
        assert cost.bytes_sent == 0
        assert cost.stages["vectors"].seconds == cost.stages["dense gradients"].seconds == 0

    def test_designs_compute_and_read_what_they_must(self) -> None:
        server = step_cost("store in server", COUNTS, WIDTHS, MACHINE)
        assert server.stages["embed"].seconds == pytest.approx(0.01 + 1000 * 2e-5)
        assert server.stages["gather"].seconds == pytest.approx(1100 * 1e-6)
        assert server.stages["features"].seconds == pytest.approx(1e-3 + 3e-4 + 1.1 * 8192 * 750 / 1e9)
        worker = step_cost("store in worker", COUNTS, WIDTHS, MACHINE)
        assert worker.stages["embed"].seconds == pytest.approx(0.01 + 2000 * 2e-5)
        assert worker.stages["samples"].seconds == pytest.approx(8192 * 2000 / 1e9)

    @pytest.mark.parametrize("together", [1, 4])
    def test_slowest_rank_counts_and_so_does_interference(self, together: int) -> None:
        network = dataclasses.replace(MACHINE.network, ranks_per_machine=together)
        machine = dataclasses.replace(MACHINE, network=network)
        plain = step_cost("exchange", COUNTS, WIDTHS, machine).seconds
        uneven = dataclasses.replace(machine, rates=dataclasses.replace(RATES, jitter=0.1), interference=1.2)
        expected = plain * 1.2 * (1 + 0.1 * highest_of(4))
        assert step_cost("exchange", COUNTS, WIDTHS, uneven).seconds == pytest.approx(expected)

    @pytest.mark.parametrize(("size", "ranks", "window"), [(32, 2, 3), (300, 4, 1)])
    def test_decoded_samples_are_those_of_the_reader(
        self, size: int, ranks: int, window: int, places: Places, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The last rank, over an epoch of batches smaller and larger than a window of the shuffle."""
        decoded: list[int] = []

        def counted(*arguments: Any) -> Any:
            groups = decode(*arguments)
            decoded.append(groups.num_samples)
            return groups

        monkeypatch.setattr("trainer.samples.reader.decode", counted)
        index = open_index(SoloComm(), str(places.folder / "samples"), "train", load_schema())
        options: dict[str, Any] = {"rank": ranks - 1, "num_ranks": ranks, "window_groups": window}
        reader = SampleReader(index, load_schema(), batch_size=size, seed=0, **options)
        steps = len(list(reader.batches()))
        mean_size = index.num_samples / steps  # the last batch is smaller
        expected = decoded_samples(mean_size, ranks, index.num_samples * window / len(index.row_groups))
        assert sum(decoded) / steps == pytest.approx(expected, rel=0.15)


class TestSkew:
    def test_highest_of_normal_draws(self) -> None:
        draws = np.random.default_rng(0).normal(size=(20_000, 20)).max(axis=1).mean()
        assert highest_of(20) == pytest.approx(draws, rel=0.01)
        assert highest_of(1) == 0

    @pytest.mark.parametrize(
        ("ranks", "shards", "unique"), [(4, 64, 2_000), (20, 64, 50_000), (20, 1024, 20_000), (6, 4, 900)]
    )
    def test_busiest_owner_of_hashed_keys(self, ranks: int, shards: int, unique: int) -> None:
        draw = np.random.default_rng(1)
        highest = [
            np.bincount(owner_of(shard_of(draw.integers(0, 2**62, unique), shards), ranks), minlength=ranks).max()
            for _ in range(60)
        ]
        assert owner_skew(unique, ranks, shards) == pytest.approx(np.mean(highest) * ranks / unique, rel=0.02)

    def test_even_shards(self) -> None:
        assert even_shards(8) == 8
        assert even_shards(20) == 256  # 13 shards of 12.8; of 128 shards some ranks have 7 of 6.4


class TestGrowth:
    @pytest.mark.parametrize(("exponent", "keys"), [(0.8, 20_000), (1.2, 200_000), (0.0, 3_000)])
    def test_extrapolation_against_real_draws(self, exponent: float, keys: int) -> None:
        """Ten times the data: within 5 %, where a power law through the last two points is further off."""
        popularity = np.arange(1, keys + 1.0) ** -exponent
        draws = np.random.default_rng(2).choice(keys, size=400_000, p=popularity / popularity.sum())
        points = [Point(n, len(np.unique(draws[: 20 * n]))) for n in (64, 125, 250, 500, 1_000, 2_000)]
        truth = len(np.unique(draws))
        curve = fit(points, draws=20)
        assert curve.unique(20_000) == pytest.approx(truth, rel=0.05)
        assert curve.error is not None and curve.error < 0.05
        by_power = Curve(tuple(points)).unique(20_000)
        assert abs(by_power / truth - 1) > abs(curve.unique(20_000) / truth - 1)

    def test_expected_unique_is_the_sum_over_keys(self) -> None:
        popularity = np.arange(1, 5_001.0) ** -0.7
        exact = -np.expm1(-9_000 * popularity / popularity.sum()).sum()
        assert expected_unique(0.7, 5_000, 9_000) == pytest.approx(exact, rel=1e-3)

    def test_measured_points_are_kept_and_limits_hold(self) -> None:
        points = [Point(100, 900.0), Point(200, 1_500.0), Point(400, 2_400.0)]
        curve = fit(points, draws=12, most=3_000)
        assert [curve.unique(point.samples) for point in points] == pytest.approx([900, 1_500, 2_400])
        assert 1_500 < curve.unique(300) < 2_400
        assert 2_400 < curve.unique(800) <= curve.unique(10**9) <= 3_000
        assert (curve.is_extrapolated(400), curve.is_extrapolated(401)) == (False, True)

    def test_few_points_or_no_keys(self) -> None:
        assert fit([Point(10, 0.0)], draws=0).unique(1_000) == 0
        linear = fit([Point(10, 50.0)], draws=5)
        assert linear.beyond is None and linear.unique(100) == 500


def batch_of(groups: int, seed: int) -> Batch:
    """Groups of one to four samples with up to five behaviours; one key for each ad."""
    draw = np.random.default_rng(seed)
    samples_G, lengths_G = draw.integers(1, 5, groups), draw.integers(0, 6, groups)
    group_B = np.repeat(np.arange(groups), samples_G)
    keys = np.random.default_rng(9).integers(-(2**62), 2**62, 300)
    one_B = np.ones(len(group_B), np.int32)
    fields = {
        "seen": Jagged(draw.choice(keys, int(lengths_G.sum())), lengths_G.astype(np.int32)),
        "ad": Jagged(draw.choice(keys, len(group_B)), one_B),
    }
    zeros_B = np.zeros(len(group_B), np.float32)
    return Batch(fields, {}, group_B, zeros_B, group_B, len(group_B))


def values_by_hand(batch: Batch, samples: range) -> list[int]:
    """Keys of these samples: the ads', and the behaviours of every group that has one of them."""
    starts_G = np.r_[0, np.cumsum(batch.fields["seen"].lengths_M)]
    groups = sorted({int(batch.group_of_sample_B[b]) for b in samples})
    seen = [int(v) for g in groups for v in batch.fields["seen"].values_N[starts_G[g] : starts_G[g + 1]]]
    return seen + [int(batch.fields["ad"].values_N[b]) for b in samples]


class TestDraws:
    def test_keys_of_a_rank_and_of_owners(self) -> None:
        batch, shards, ranks = batch_of(60, seed=3), 16, 3
        drawn = Drawn(batch, (("seen", "ad"),), frozenset({"seen"}), shards)
        size = batch.num_samples
        found = drawn_keys(drawn, size, ranks, references=2.0)
        asked, served = [], np.zeros(ranks, int)
        for rank in range(ranks):
            keys_U = np.unique(values_by_hand(batch, range(size * rank // ranks, size * (rank + 1) // ranks)))
            asked.append(len(keys_U))
            served += np.bincount(owner_of(shard_of(keys_U, shards), ranks), minlength=ranks)
        whole_U = np.unique(values_by_hand(batch, range(size)))
        owned = np.bincount(owner_of(shard_of(whole_U, shards), ranks), minlength=ranks)
        assert (found.asked, found.served) == (np.mean(asked), served.max())
        assert (found.unique, found.owned, found.references) == (len(whole_U), owned.max(), 2.0 * size)

    def test_sources_do_not_share_keys(self) -> None:
        batch = batch_of(60, seed=3)
        both = Drawn(batch, (("seen",), ("ad",)), frozenset({"seen"}), 16)
        alone = [Drawn(batch, ((name,),), frozenset({"seen"}), 16) for name in ("seen", "ad")]
        size = batch.num_samples
        expected = sum(drawn_keys(each, size, 2, 1.0).unique for each in alone)
        assert drawn_keys(both, size, 2, 1.0).unique == expected

    def test_counts_of_drawn_batches_are_those_of_the_readers(self, places: Places) -> None:
        """What the plan counts for two ranks is what two readers hand to two ranks, images and ids."""
        config = load_config(settings=places.settings())
        question = Question((2,), 64, False, 1, 1e9, 0.0)
        sampled = sample(config, question)
        drawn = sampled.images.drawn
        assert drawn is not None and drawn.num_samples == sampled.index.num_samples
        found, asked, whole = sampled.images.keys(64, 2), [], []
        for rank in range(2):
            options: dict[str, Any] = {"rank": rank, "num_ranks": 2, "window_groups": 3}
            reader = SampleReader(sampled.index, sampled.schema, batch_size=64, seed=0, **options)
            fields = [batch.fields for batch in reader.batches()]
            parts = [np.r_[each["behavior_image"].values_N, each["ad_image"].values_N] for each in fields]
            asked.append([len(np.unique(keys_N)) for keys_N in parts[:-1]])
            whole.append(parts[:-1])
        unique = [len(np.unique(np.r_[a, b])) for a, b in zip(*whole, strict=True)]
        assert found.asked == pytest.approx(np.mean(asked), rel=0.05)
        assert found.unique == pytest.approx(np.mean(unique), rel=0.05)
        assert not found.extrapolated and sampled.images.keys(10_000, 2).extrapolated
        assert sampled.images.keys(10**6, 2).unique == pytest.approx(40, rel=0.1)  # all items with an image
        assert sampled.ids.keys(64, 2).unique > found.unique

    def test_points_of_the_curve(self) -> None:
        drawn = Drawn(batch_of(200, seed=4), (("ad",),), frozenset({"seen"}), 16)
        curve = population(drawn, [100, 10**6], math.inf).curve
        assert {point.samples for point in curve.points} >= {100, drawn.num_samples}
        assert all(point.unique <= 300 for point in curve.points)
        assert drawn.references() == 1.0 and drawn.draws() <= 1.0


class TestPaper:
    @pytest.fixture(scope="class")
    @staticmethod
    def plan() -> Any:
        return plan_input(load_input(PAPER))

    def test_table_1(self, plan: Any) -> None:
        """Hours of two epochs of 18 days, and the efficiency against 5 nodes."""
        hours = {row.ranks: row.day_s["exchange"] * 36 / 3600 for row in plan.rows}
        assert hours[5] == pytest.approx(62.9, rel=1e-3)  # what the compute of a node is taken from
        assert [hours[ranks] for ranks in (10, 20, 40)] == pytest.approx([32.0, 17.4, 10.2], rel=0.05)
        efficiency = {row.ranks: row.efficiency["exchange"] for row in plan.rows}
        assert efficiency[20] == pytest.approx(0.90, abs=0.02)
        assert efficiency[40] == pytest.approx(0.77, abs=0.03)

    def test_table_2(self, plan: Any) -> None:
        """Bytes of one batch over all 20 nodes; a twentieth of the keys is a node's own."""
        row = next(row for row in plan.rows if row.ranks == 20)
        ours, server = (row.costs[design].bytes_by_part for design in ("exchange", "store in server"))
        both_ways = 20 / 0.95 * (ours["image vectors"] + ours["image gradients"])
        assert both_ways == pytest.approx(30e6, rel=0.05)
        ids = 20 / 0.95 * (ours["id vectors"] + ours["id gradients"])
        assert both_ways + ids == pytest.approx(158e6, rel=0.06)
        assert 20 / 0.95 * server["features"] == pytest.approx(5.0e9, rel=0.07)

    def test_without_latency_and_jitter_it_would_scale_better(self) -> None:
        """So the two figures come from the assumptions that are printed, and from nothing else."""
        described = load_input(PAPER)
        free = described.network.model_copy(update={"latency_us": 0.0, "call_ms": 0.0})
        plan = plan_input(described.model_copy(update={"network": free, "jitter": 0.0}))
        assert plan.rows[-1].efficiency["exchange"] > 0.92
        printed = " ".join(plan_input(described).assumptions)
        assert all(text in printed for text in ("10Gb", "200 us", "vary by 5%", "62.9 h"))

    def test_command(self) -> None:
        done = CliRunner().invoke(app, ["--paper"])
        assert done.exit_code == 0
        assert "exchange" in done.stdout and "62.9 h" in done.stdout


class TestInput:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [("10Gb", 1.25e9), ("400Mbit", 5e7), ("1 Gbit/s", 1.25e8), ("2.5gbps", 3.125e8), ("100 kb", 12_500.0)],
    )
    def test_speeds(self, text: str, expected: float) -> None:
        assert bytes_per_s(text) == expected

    @pytest.mark.parametrize("text", ["", "10", "10GB", "10GB/s", "10Gb/h", "fast", "0Gb", "-1Gb"])
    def test_speeds_refused(self, text: str) -> None:
        with pytest.raises(ConfigError, match=r"bits .*per second"):
            bytes_per_s(text)

    def test_files_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no such file"):
            load_input(tmp_path / "none.yaml")
        wrong = tmp_path / "wrong.yaml"
        wrong.write_text(PAPER.read_text().replace("speed: 10Gb", "speed: quick").replace("ranks: [5", "ranks: [0"))
        with pytest.raises(ConfigError, match=r"(?s)ranks\.0=0.*per second"):
            load_input(wrong)
        wrong.write_text(PAPER.read_text().replace("hours: 62.9", "hours: 0.001"))
        with pytest.raises(ConfigError, match="the wire alone takes longer"):
            plan_input(load_input(wrong))


class TestBuild:
    STORED = Stored(rows=1_000_000, dim=4096, dtype="bfloat16", shards=64, table_bytes=64_000, table_shards=64)

    def test_memory_of_the_rank_with_most_shards(self) -> None:
        assert self.STORED.feature_bytes("bfloat16", 20) == 1_000_000 * 8192 * 4 / 64
        assert self.STORED.feature_bytes("int8", 1) == 1_000_000 * 4096
        assert self.STORED.rank_bytes(20) == 1_000_000 * 8192 * 4 / 64 + 4_000

    def test_efficiency_and_choice(self) -> None:
        def counts_of(ranks: int) -> BatchCounts:
            unique = 2_000.0
            images = Keys(8_000, unique / ranks, unique / ranks, unique, unique / ranks * (1.25 if ranks > 1 else 1))
            return BatchCounts(1_000, ranks, 0.0, images, Keys(0, 0, 0, 0, 0))

        plan = build("t", counts_of, [1, 20], 1, WIDTHS, {1: MACHINE}, self.STORED, 1e6, ["granted"])
        alone, many = plan.rows
        assert alone.efficiency["exchange"] == 1
        expected = alone.costs["exchange"].seconds / many.costs["exchange"].seconds / 20
        assert many.efficiency["exchange"] == pytest.approx(expected)
        assert many.day_s["exchange"] == pytest.approx(1e3 * many.costs["exchange"].seconds)
        assert many.best == "exchange"

    def test_advice(self) -> None:
        def row_of(skew: float, seconds: float) -> Row:
            keys = Keys(8_000, 100, 100, 2_000, 100 * skew)
            counts = BatchCounts(1_000, 20, 0.0, keys, dataclasses.replace(keys, owned=100.0))
            costs = {d: StepCost(d, 1.0 if d == "exchange" else seconds, 1.0, {}, {}) for d in DESIGNS}
            return Row(20, counts, costs, {}, {}, {}, rank_bytes=6e9, sample_day_bytes=4e12)

        chosen = "20 ranks: exchange. Its samples/s are 3 times store in server's and 3 times store in worker's."
        assert advise(row_of(1.04, 3.0), self.STORED) == [chosen]
        uneven = advise(row_of(1.25, 3.0), self.STORED)
        assert uneven[0] == chosen and "25% more images" in uneven[1] and "--num-shards 256." in uneven[1]
        assert "Of that 25% are due to 64 shards" in uneven[1]
        small = dataclasses.replace(self.STORED, machine_memory_bytes=10**10)
        assert advise(row_of(1.0, 3.0), small) == [chosen]
        assert (
            "a machine has to hold 12 GB, and this one has 10 GB" in advise(row_of(1.0, 3.0), small, local_ranks=2)[1]
        )
        assert "20 ranks: store in server. " in advise(row_of(1.25, 0.5), self.STORED)[0]
        assert advise(row_of(1.25, 0.5), self.STORED)[0].endswith("This trainer does not offer it.")

    def test_more_ranks_that_are_slower_are_told(self) -> None:
        def counts_of(ranks: int) -> BatchCounts:
            keys = Keys(100, 50, 50, 50, 50 / ranks)
            return BatchCounts(100, ranks, 100 / ranks, keys, keys)

        slow = dataclasses.replace(MACHINE, network=dataclasses.replace(NETWORK, latency_s=1.0))
        advice = build("t", counts_of, [1, 20], 1, WIDTHS, {1: slow}, self.STORED, 1e6, []).advice
        assert any(line.startswith("20 ranks are slower than 1: ") for line in advice)

    def test_a_machine_that_was_busy_is_told(self) -> None:
        def advice_at(interference: float) -> str:
            machine = dataclasses.replace(MACHINE, interference=interference)
            keys = Keys(100, 50, 50, 50, 50)
            counts = BatchCounts(100, 1, 100, keys, keys)
            return build("t", lambda _: counts, [1], 1, WIDTHS, {1: machine}, self.STORED, 1e6, []).advice[0]

        assert "was busy" in advice_at(0.5) and "0.5 times" in advice_at(0.5)
        assert "was busy" not in advice_at(0.9)

    def test_times_that_are_near_are_a_tie_of_which_the_fewest_bytes_win(self) -> None:
        def row_of(server_s: float) -> Row:
            keys = Keys(8_000, 100, 100, 2_000, 100)
            seconds: dict[Design, float] = {"exchange": 1.0, "store in server": server_s, "store in worker": 9.0}
            size = {"exchange": 10.0, "store in server": 800.0, "store in worker": 2_000.0}
            costs = {d: StepCost(d, seconds[d], 1.0, {"all": size[d]}, {}) for d in DESIGNS}
            return Row(20, BatchCounts(1_000, 20, 0.0, keys, keys), costs, {}, {}, {}, 6e9, 4e12)

        assert row_of(0.84).best == "exchange" and row_of(0.82).best == "store in server"
        assert "the fewest bytes decide" in advise(row_of(0.84), self.STORED)[0]
        assert "the fewest bytes decide" not in advise(row_of(1.1), self.STORED)[0]


class TestMeasuring:
    def test_line_through_two_sizes(self) -> None:
        small = Timed({"embed": 100.0, "rows": 0.0}, {"embed": 0.3, "rows": 0.0}, (1.0, 1.5))
        large = Timed({"embed": 300.0, "rows": 0.0}, {"embed": 0.5, "rows": 0.0}, (1.0, 2.0))
        assert line(small, large, "embed") == Piece(pytest.approx(0.2), pytest.approx(0.001), 2.0)
        assert line(small, large, "rows") == Piece(0.0, 0.0, 2.0)
        assert line(large, large, "embed") == Piece(0.0, pytest.approx(0.5 / 300), 2.0)

    def test_interference_is_the_loop_over_its_stages(self) -> None:
        units = {"read": 100.0, "route": 100.0, "gather": 50.0, "embed": 50.0, "worker": 100.0, "rows": 10.0}
        alone = 0.011 + 0.003 + 1e-6
        measured = Measured(RATES, 2 * alone, units)
        assert calibrate.interference(measured, MACHINE, 1) == pytest.approx(2.0)

    def test_failed_program_is_one_message(self) -> None:
        with pytest.raises(PlanError, match=r"measuring this machine failed \(trainer\.plan\.rates.*: .*nowhere\.yaml"):
            calibrate._run("trainer.plan.rates", 1, ["/nowhere.yaml", "10", "1"])

    def test_standin(self, tmp_path: Path) -> None:
        extractor = ExtractorSpec(
            backbone="drawn", layer="none", weights_digest="0", preprocessing="none", compute_dtype="float32"
        )
        info = StoreInfo(num_shards=4096, dim=16, dtype="bfloat16", extractor=extractor)
        store = standin.make(tmp_path / "features", info, np.arange(100))
        snapshot = FeatureStore.open(tmp_path / "features").snapshot()
        assert (snapshot.num_rows, store.info.dim, store.info.dtype) == (100, 16, "bfloat16")
        assert standin.fits(info, 1_000) and not standin.fits(info, 10**12)


class TestCommand:
    @pytest.fixture(scope="class")
    @staticmethod
    def plan(places: Places, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
        """Two and four ranks, one a machine, really measured."""
        file = tmp_path_factory.mktemp("plan") / "plan.json"
        options = ["--ranks", "2,4", "--global-batch-size", "100", "--network", "1Gb", "--json", str(file)]
        for setting in places.settings():
            options += ["--set", setting]
        done = CliRunner().invoke(app, options)
        assert done.exit_code == 0, done.output
        assert "What to choose" in done.stdout and "Taken for granted" in done.stdout
        values: dict[str, Any] = json.loads(file.read_text())
        return values

    def test_figures(self, plan: dict[str, Any]) -> None:
        assert list(plan["ranks"]) == ["2", "4"]
        for ranks, row in plan["ranks"].items():
            ours = row["designs"]["exchange"]
            assert ours["step_s"] > 0 and ours["samples_per_s"] == pytest.approx(100 / ours["step_s"])
            assert 0 < ours["efficiency"] < 1.5
            assert row["stored_bytes_per_rank"]["float32"] == pytest.approx(50 * 16 * 4 / int(ranks))
            assert row["counts"]["images"]["unique"] <= 40
            assert row["choose"] in row["designs"]
        # 200 groups in three files named after days.
        assert 150 < plan["samples_per_day"] < 350
        assert any("1 Gbit/s" in line for line in plan["assumptions"])

    def test_bytes_are_those_of_the_counts(self, plan: dict[str, Any]) -> None:
        for ranks, row in plan["ranks"].items():
            away = 1 - 1 / int(ranks)
            asked = row["counts"]["images"]["asked"] + row["counts"]["ids"]["asked"]
            parts = row["designs"]["exchange"]["bytes_by_part"]
            assert parts["keys"] == pytest.approx(8 * away * asked)
            assert parts["image vectors"] == pytest.approx(48 * away * row["counts"]["images"]["asked"])
            # E is 16-8-4-12 with a PReLU after each hidden layer: 234 numbers, and the worker's model beside it.
            assert parts["dense gradients"] > 2 * away * 4 * 234

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            (["--ranks", "0"], 2, "--ranks 0: write numbers from 1 on"),
            (["--ranks", "2,x"], 2, "--ranks 2,x"),
            (["--network", "10"], 2, "network speed '10'"),
            (["--global-batch-size", "8", "--ranks", "16"], 2, "leaves some of 16 ranks without any"),
            (["--global-batch-size", "8", "--samples-per-rank", "8"], 2, "exclude each other"),
            (["--set", "model.images=none"], 2, "model.images=none"),
            (["--device", "tpu"], 2, "run.device"),
            (["--samples", "/nowhere/samples"], 2, "build_samples.py"),
            (["--store", "/nowhere/features"], 2, "/nowhere/features"),
            (["--input", "/nowhere.yaml"], 2, "no such file"),
            (["--paper", "--json", "/nowhere/plan.json"], 1, "--json /nowhere/plan.json"),
            (["--paper", "--network", "1Gb", "--set", "a=b"], 2, "leave out --network, --set"),
            (["--latency-us", "inf"], 2, "--latency-us inf"),
            (["--set", "run.threads=1000000"], 2, "run.threads=1000000"),
        ],
    )
    def test_mistakes(self, options: list[str], code: int, message: str, places: Places) -> None:
        own = {"data.samples", "data.store"} if {"--samples", "--store"} & set(options) else set()
        settings = [each for each in places.settings() if each.partition("=")[0] not in own]
        alone = {"--input", "--paper"} & set(options)
        given = [] if alone else ["--ranks", "2", *(word for each in settings for word in ("--set", each))]
        if own:  # the places come by the options of their own, right ones first
            given += ["--samples", str(places.folder / "samples"), "--store", str(places.folder / "features")]
        done = CliRunner().invoke(app, [*given, *options])
        assert done.exit_code == code, done.output
        assert message in done.stderr
        assert "Traceback" not in done.output
