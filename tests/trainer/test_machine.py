"""What a rank takes of its machine: threads of its share of the cores, and the device it computes on."""

import pytest

from trainer.comm import SoloComm
from trainer.config import Device, load_config
from trainer.errors import ConfigError
from trainer.machine import Place, share_machine, threads_of, uses_cuda


def place(host: str, *cores: int) -> Place:
    return Place(host, frozenset(cores), has_gpu=False)


class TestThreads:
    def test_ranks_that_may_run_anywhere_share_the_cores(self) -> None:
        places = [place("a", *range(8))] * 3 + [place("b", *range(8))]
        assert [threads_of(rank, places) for rank in range(4)] == [2, 2, 2, 8]

    def test_a_rank_bound_to_cores_of_its_own_takes_all_of_them(self) -> None:
        places = [place("a", 0, 1, 2, 3), place("a", 4, 5, 6, 7)]
        assert [threads_of(rank, places) for rank in range(2)] == [4, 4]

    def test_ranks_bound_to_the_same_socket_share_it(self) -> None:
        places = [place("a", 0, 1, 2, 3)] * 2 + [place("a", 4, 5, 6, 7)] * 2
        assert [threads_of(rank, places) for rank in range(4)] == [2, 2, 2, 2]

    def test_threads_without_end_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"run\.threads=1000000: a rank may run on \d+ cores"):
            share_machine(load_config(None, ["run.threads=1000000"]), SoloComm())

    def test_more_ranks_than_cores_have_a_thread_each(self) -> None:
        assert threads_of(2, [place("a", 0, 1)] * 4) == 1


class TestDevice:
    @pytest.mark.parametrize(
        ("device", "available", "moves", "expected"),
        [
            ("auto", True, True, True),
            ("auto", True, False, False),
            ("auto", False, True, False),
            ("cpu", True, True, False),
            ("cpu", False, False, False),
            ("cuda", True, True, True),
        ],
    )
    def test_choice(self, device: Device, available: bool, moves: bool, expected: bool) -> None:
        assert uses_cuda(device, available, moves) is expected

    def test_cuda_that_is_not_there_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="finds no GPU"):
            uses_cuda("cuda", available=False, moves_cuda_tensors=True)
        with pytest.raises(ConfigError, match="without NCCL"):
            uses_cuda("cuda", available=True, moves_cuda_tensors=False)
