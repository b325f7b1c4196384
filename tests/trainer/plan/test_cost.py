"""What a step costs, by hand: bytes, stages, the busiest owner."""

import dataclasses

import pytest

from tests.trainer.plan.machine import COUNTS, MACHINE, NETWORK, WIDTHS
from trainer.plan.cost import bytes_by_part, even_shards, step_cost


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

    def test_step_waits_for_the_busiest_owner_or_for_reading(self) -> None:
        cost = step_cost(COUNTS, WIDTHS, MACHINE)
        # Vectors and gradients: three messages; the busiest owners have 20 and 4 % more than the mean.
        vectors = 1e-3 + 3 * 1e-4 + (1.2 * 48 * 0.75 * 1000 + 1.04 * 48 * 0.75 * 2000) / 1e9
        dense = 1e-3 + 6 * 1e-4 + 6e6 / 1e9
        assert cost.seconds == pytest.approx(600 * 2e-5 + 250 * 1.2e-5 + 2 * vectors + dense)
        assert cost.samples_per_s == pytest.approx(1000 / cost.seconds)
        assert cost.stages["read"] == pytest.approx(300 * 1e-5)
        assert step_cost(COUNTS, WIDTHS, dataclasses.replace(MACHINE, read_s=1e-3)).seconds == 0.3

    def test_ranks_of_a_machine_share_its_link(self) -> None:
        crowded = dataclasses.replace(MACHINE, network=dataclasses.replace(NETWORK, ranks_per_machine=4))
        cost = step_cost(COUNTS, WIDTHS, crowded)
        assert cost.stages["dense gradients"] == pytest.approx(1e-3 + 6e6 / 5e9)  # no latency inside a machine
        two = dataclasses.replace(NETWORK, ranks_per_machine=2)
        # Two thirds of what a rank sends leave the machine, over half of its link.
        assert two.alltoall_s(4, 3e6) == pytest.approx(1e-3 + 3 * 1e-4 + 2e6 / 0.5e9 + 1e6 / 5e9)

    def test_one_rank_has_no_wire(self) -> None:
        alone = dataclasses.replace(COUNTS, ranks=1)
        cost = step_cost(alone, WIDTHS, MACHINE)
        assert cost.bytes_sent == 0
        assert cost.stages["vectors"] == cost.stages["dense gradients"] == 0


def test_even_shards() -> None:
    assert even_shards(8) == 8
    assert even_shards(20) == 256  # 13 shards of 12.8; of 128 shards some ranks have 7 of 6.4
