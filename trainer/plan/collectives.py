"""A program on ranks that measures the cost of collectives, almost empty and with eight megabytes.

horovodrun -np 2 python -m trainer.plan.collectives
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from trainer.comm import Comm, connect

_ROUNDS, _WARM_UP = 15, 3
_SMALL_FLOATS, _LARGE_FLOATS = 64, 2 << 20


def measure(comm: Comm) -> dict[str, float]:
    """Measure seconds of a call, and of a byte that a rank sends, means of alltoall and allreduce; every rank calls it.

    The slowest rank counts, the median of the rounds. Bytes are those that leave a rank: of an allreduce in a ring,
    2 (P - 1) / P times its values.
    """
    calls_s, bytes_s = [], []
    for collective, ways in ((_alltoall, 1), (_allreduce, 2)):
        call_s, large_s = (_median_s(comm, partial(collective, comm, each)) for each in (_SMALL_FLOATS, _LARGE_FLOATS))
        sent_bytes = 4 * _LARGE_FLOATS * ways * (comm.size - 1) / comm.size
        calls_s.append(call_s)
        bytes_s.append(max(0.0, large_s - call_s) / sent_bytes)
    return {"call_s": statistics.fmean(calls_s), "byte_s": statistics.fmean(bytes_s)}


def _alltoall(comm: Comm, floats: int) -> None:
    rows_N = torch.zeros(max(1, floats // comm.size) * comm.size, 1)
    splits_P = torch.full((comm.size,), len(rows_N) // comm.size, dtype=torch.int32)
    comm.alltoall(rows_N, splits_P, name="plan")


def _allreduce(comm: Comm, floats: int) -> None:
    comm.allreduce_sum_(torch.zeros(floats), name=f"plan.{floats}")


def _median_s(comm: Comm, collective: Callable[[], None]) -> float:
    seconds: list[float] = []
    for number in range(_WARM_UP + _ROUNDS):
        comm.agree(None)
        start = time.perf_counter()
        collective()
        if number >= _WARM_UP:
            seconds.append(time.perf_counter() - start)
    return max(comm.allgather_object(statistics.median(seconds), name="plan.seconds"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks = connect()
    found = measure(ranks)
    if ranks.rank == 0:
        sys.stdout.write(json.dumps(found) + "\n")
    ranks.close()
