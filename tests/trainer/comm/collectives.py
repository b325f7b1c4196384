"""Run by test_comm.py on three ranks: collectives that all take, then two that rank 1 does not come to.

Every expected value is computed from rank and size.
"""

import os
import sys
import threading
import time

import torch

from trainer.comm import Comm, HorovodComm, TorchComm, Traffic, connect
from trainer.errors import DataError, LateRankError, RemoteRankError


def main() -> None:
    comm = connect()
    assert type(comm) is (HorovodComm if "HOROVOD_RANK" in os.environ else TorchComm)
    check(comm)
    say(f"rank {comm.rank} of {comm.size} is done")
    miss_rank_1(comm)


def check(comm: Comm) -> None:
    """Take every collective, with rows for some peers, for none, and with an error on one rank."""
    rank, size = comm.rank, comm.size
    assert comm.carrier(torch.device("cpu")) == "Gloo"

    # Rank r sends r + p rows of (r, p) to rank p: none from 0 to 0.
    counts = [rank + peer for peer in range(size)]
    sent = torch.tensor([(rank, peer) for peer, n in enumerate(counts) for _ in range(n)], dtype=torch.float64)
    got, splits = comm.alltoall(sent.reshape(-1, 2), torch.tensor(counts, dtype=torch.int32), name="test")
    assert splits.tolist() == [peer + rank for peer in range(size)] and splits.dtype == torch.int32
    assert got.tolist() == [[peer, rank] for peer in range(size) for _ in range(peer + rank)]
    others = 16 * (sum(counts) - counts[rank])
    assert comm.traffic == {"test": Traffic(others, others)}

    nothing, splits = comm.alltoall(torch.zeros(0, 4), torch.zeros(size, dtype=torch.int32), name="test")
    assert nothing.shape == (0, 4) and splits.tolist() == [0] * size

    values = torch.tensor([rank, 1.0])
    assert comm.allreduce_sum_(values, name="test") is values
    assert values.tolist() == [size * (size - 1) / 2, size]

    gathered = comm.allgather(torch.full((rank, 2), rank), name="test")
    assert gathered.tolist() == [[peer, peer] for peer in range(size) for _ in range(peer)]
    assert comm.allgather_object(("rank", rank)) == [("rank", peer) for peer in range(size)]
    assert comm.broadcast_object(rank, root=1) == 1

    comm.agree(None)
    try:
        comm.agree(DataError("no samples") if rank == 1 else None)
    except (DataError, RemoteRankError) as error:
        expected = DataError if rank == 1 else RemoteRankError
        assert type(error) is expected, error
        assert rank == 1 or str(error) == "rank 1 failed: DataError: no samples"
    else:
        raise AssertionError("nobody raised")


def miss_rank_1(comm: Comm) -> None:
    """Wait for rank 1 in two collectives at once, beyond the deadline, and end."""
    comm.deadline_s = 1.0
    if comm.rank == 1:
        time.sleep(60)
    ahead = threading.Thread(target=exchange, args=(comm, "step.keys"))
    ahead.start()
    exchange(comm, "step.vectors")
    ahead.join()
    assert comm.is_stuck
    comm.close()
    time.sleep(1)  # the other one has to be given the time to say so too
    os._exit(7)


def exchange(comm: Comm, name: str) -> None:
    """Say which rank is missing, and after how long."""
    started = time.monotonic()
    try:
        comm.alltoall(torch.zeros(3, 2), torch.ones(3, dtype=torch.int32), name=name)
    except LateRankError as error:
        say(f"after {time.monotonic() - started:.0f} s: {error}")


def say(text: str) -> None:
    """Print a line at once: these ranks end in a hurry."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
