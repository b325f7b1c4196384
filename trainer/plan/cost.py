"""The cost of a step on ranks and machines: bytes that travel, and seconds, each a mean over steps.

As a program on ranks, it measures collectives: horovodrun -np 2 python -m trainer.plan.cost
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from trainer.comm import Comm, connect

KEY_BYTES = 8
_ROUNDS, _WARM_UP = 15, 3
_SMALL_FLOATS, _LARGE_FLOATS = 64, 2 << 20


@dataclass(frozen=True)
class KeyCounts:
    """Counts of keys of one kind (images, ids) in one global batch of P ranks."""

    asked: float
    """Unique keys of one rank, mean over ranks: those it requests, and those requested from an owner."""
    unique: float
    """In the whole batch."""
    owned: float
    """Unique keys of the busiest owner."""

    def skew(self, ranks: int) -> float:
        """Divide the keys of the busiest owner by the mean."""
        return self.owned * ranks / self.unique if self.unique else 1.0


@dataclass(frozen=True)
class BatchCounts:
    """What one step of a global batch of `samples` on `ranks` works on.

    `decoded`: samples that the rank decodes which has most to.
    """

    samples: int
    ranks: int
    decoded: float
    images: KeyCounts
    ids: KeyCounts


@dataclass(frozen=True)
class Widths:
    """The bytes of a vector and of the dense gradients, as they travel."""

    image_vector_bytes: int
    id_vector_bytes: float
    dense_bytes: int
    """Gradients of all parameters that every rank holds."""


@dataclass(frozen=True)
class NetworkSpeed:
    """Collectives by Hockney's model: a call, a latency per message, a time per byte.

    An alltoall is P - 1 messages of each rank; a ring allreduce 2 (P - 1), and 2 (P - 1) / P of its values leave a rank
    (Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", 2005).
    Ranks of one machine share its link; what they send each other goes at the speed of the loopback.
    """

    call_s: float
    """Seconds of any collective without data, measured between ranks of one machine."""
    latency_s: float
    """Additional seconds per message to another rank if there are several machines."""
    link_bytes_per_s: float
    """Of a machine, each way."""
    local_bytes_per_s: float
    """Bandwidth of a rank, between ranks of one machine: also the limit of its software."""
    ranks_per_machine: int = 1

    def alltoall_s(self, ranks: int, bytes_out: float) -> float:
        """Return the seconds of an alltoall. `bytes_out`: bytes sent or received by a rank, whichever is more."""
        return self._seconds(ranks, ranks - 1, bytes_out)

    def allreduce_s(self, ranks: int, size_bytes: float) -> float:
        """Return the seconds of a ring allreduce. `size_bytes`: of the values that are summed."""
        return self._seconds(ranks, 2 * (ranks - 1), ring_bytes(ranks, size_bytes))

    def _seconds(self, ranks: int, messages: int, bytes_out: float) -> float:
        if ranks == 1:
            return 0.0
        local = min(self.ranks_per_machine, ranks)
        if local == ranks:
            return self.call_s + bytes_out / self.local_bytes_per_s
        away = bytes_out * (ranks - local) / (ranks - 1)
        speed = min(self.link_bytes_per_s / local, self.local_bytes_per_s)
        return self.call_s + messages * self.latency_s + away / speed + (bytes_out - away) / self.local_bytes_per_s


@dataclass(frozen=True)
class Machine:
    """A rank's times on a machine with its final number of ranks, and the network between ranks."""

    read_s: float
    """Per sample decoded, from Parquet to a batch; reading goes on during the step."""
    image_s: float
    """Of a step without a wire, per unique image: gather and E, forward and backward."""
    sample_s: float
    """All else of this step, per sample of the rank."""
    network: NetworkSpeed


@dataclass(frozen=True)
class StepCost:
    """The bytes and seconds of one step. Bytes leave a rank, mean over ranks."""

    seconds: float
    samples_per_s: float
    bytes_by_part: Mapping[str, float]
    stages: Mapping[str, float]
    """Seconds of each part of a step."""

    @property
    def bytes_sent(self) -> float:
        """Return the bytes that one rank sends to others in a step."""
        return sum(self.bytes_by_part.values())


def ring_bytes(ranks: int, size_bytes: float) -> float:
    """Return the bytes that leave a rank in a ring allreduce."""
    return 2 * size_bytes * (ranks - 1) / ranks


def bytes_by_part(counts: BatchCounts, widths: Widths) -> dict[str, float]:
    """Return the bytes that leave a rank in a step, mean over ranks: of its keys, (P - 1) / P belong to others."""
    away = (counts.ranks - 1) / counts.ranks
    images, ids = (width * away for width in (widths.image_vector_bytes, widths.id_vector_bytes))
    return {
        "keys": KEY_BYTES * away * (counts.images.asked + counts.ids.asked),
        "image vectors": images * counts.images.asked,
        "image gradients": images * counts.images.asked,
        "id vectors": ids * counts.ids.asked,
        "id gradients": ids * counts.ids.asked,
        "dense gradients": ring_bytes(counts.ranks, widths.dense_bytes),
    }


def step_cost(counts: BatchCounts, widths: Widths, machine: Machine) -> StepCost:
    """Compute the step of a global batch, which waits for the busiest owner.

    Keys are exchanged during the step before, and reading goes on during all steps: it counts where it takes longer.
    """
    sizes, ranks, network = bytes_by_part(counts, widths), counts.ranks, machine.network
    vectors = counts.images.skew(ranks) * sizes["image vectors"] + counts.ids.skew(ranks) * sizes["id vectors"]
    vectors_s = network.alltoall_s(ranks, vectors)
    stages = {
        "images": machine.image_s * counts.images.owned,
        "samples": machine.sample_s * counts.samples / ranks,
        "vectors": vectors_s,
        "gradients": vectors_s,
        "dense gradients": network.allreduce_s(ranks, widths.dense_bytes),
    }
    read_s = machine.read_s * counts.decoded
    seconds = max(read_s, sum(stages.values()))
    return StepCost(seconds, counts.samples / seconds, sizes, {"read": read_s, **stages})


def measure_collectives(comm: Comm) -> dict[str, float]:
    """Measure seconds of a call and of a sent byte, means of alltoall and allreduce; every rank calls it.

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
    found = measure_collectives(ranks)
    if ranks.rank == 0:
        sys.stdout.write(json.dumps(found) + "\n")
    ranks.close()
