"""What a step costs, by hand: bytes, stages, lanes, the slowest rank, the busiest owner."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from featurestore.keys import owner_of, shard_of
from tests.trainer.plan.machine import COUNTS, MACHINE, NETWORK, RATES, WIDTHS
from trainer.plan.cost import StageRate, bytes_by_part, highest_of, owner_skew, step_cost
from trainer.plan.table import even_shards

Places = Any


class TestCost:
    def test_bytes_of_each_part(self) -> None:
        away = 0.75  # a quarter of a rank's keys are its own
        assert bytes_by_part(COUNTS, WIDTHS) == {
            "keys": 8 * away * 3000,
            "id vectors": 48 * away * 2000,
            "id gradients": 48 * away * 2000,
            "dense gradients": 1.5 * 4_000_000,
            "image vectors": 48 * away * 1000,
            "image gradients": 48 * away * 1000,
        }

    def test_step_is_the_longest_lane(self) -> None:
        cost = step_cost(COUNTS, WIDTHS, MACHINE)
        embed, worker, rows = 0.01 + 600 * 2e-5, 0.002 + 250 * 1e-5, 1300 * 1e-7
        # Vectors and gradients: three messages, 10 % more than the mean out of the busiest owner.
        vectors = 1e-3 + 3 * 1e-4 + 1.1 * (48 * 0.75 * 1000 + 48 * 0.75 * 2000) / 1e9
        dense = 1e-3 + 6 * 1e-4 + 6e6 / 1e9
        assert cost.seconds == pytest.approx(embed + worker + rows + 2 * vectors + dense)
        assert cost.samples_per_s == pytest.approx(1000 / cost.seconds)
        assert cost.stages["keys"].seconds == pytest.approx(1e-3 + 3e-4 + 1.1 * 8 * 0.75 * 3000 / 1e9)
        slow_reader = dataclasses.replace(RATES, read=StageRate(0.0, 1e-3))
        assert step_cost(COUNTS, WIDTHS, dataclasses.replace(MACHINE, rates=slow_reader)).seconds == 0.3

    def test_ranks_of_a_machine_share_its_cores_and_its_link(self) -> None:
        crowded = dataclasses.replace(
            MACHINE, cores=1, network=dataclasses.replace(NETWORK, ranks_per_machine=4), rates=RATES
        )
        cost = step_cost(COUNTS, WIDTHS, crowded)
        busy = sum(stage.busy_s for stage in cost.stages.values())
        assert cost.seconds == pytest.approx(4 * busy)
        assert cost.stages["dense gradients"].seconds == pytest.approx(1e-3 + 6e6 / 5e9)  # no latency inside a machine
        two = dataclasses.replace(NETWORK, ranks_per_machine=2)
        # Two thirds of what a rank sends leave the machine, over half of its link.
        assert two.alltoall_s(4, 3e6) == pytest.approx(1e-3 + 3 * 1e-4 + 2e6 / 0.5e9 + 1e6 / 5e9)

    def test_one_rank_has_no_wire(self) -> None:
        alone = dataclasses.replace(COUNTS, ranks=1)
        cost = step_cost(alone, WIDTHS, MACHINE)
        assert cost.bytes_sent == 0
        assert cost.stages["vectors"].seconds == cost.stages["dense gradients"].seconds == 0

    @pytest.mark.parametrize("together", [1, 4])
    def test_slowest_rank_counts_and_so_does_interference(self, together: int) -> None:
        network = dataclasses.replace(MACHINE.network, ranks_per_machine=together)
        machine = dataclasses.replace(MACHINE, network=network)
        plain = step_cost(COUNTS, WIDTHS, machine).seconds
        uneven = dataclasses.replace(machine, rates=dataclasses.replace(RATES, jitter=0.1), interference=1.2)
        expected = plain * 1.2 * (1 + 0.1 * highest_of(4))
        assert step_cost(COUNTS, WIDTHS, uneven).seconds == pytest.approx(expected)


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
