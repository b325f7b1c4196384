"""Run by test_comm.py on ranks:  python collectives.py FOLDER|connects|stops

FOLDER, three ranks: collectives that all take, in any order, then two that rank 1 does not come to. Every expected
value is computed from rank and size. Two ranks of which one says how it ends: `connects`, where the first one dies
after it has connected, or stops before it where STOPS is set; `stops`, where the two meet once, and the first one stops
before the second time.
"""

import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from featurestore.errors import UserError
from trainer.comm import Comm, HorovodComm, TorchComm, Traffic, connect
from trainer.errors import DataError, LateRankError, RemoteRankError

MEETINGS = 30


def main() -> None:
    try:
        {"connects": connects, "stops": stops}.get(sys.argv[1], take_all)()
    except UserError as error:
        say(f"{type(error).__name__} {error}")
    os._exit(7)


def connects() -> None:
    """Connect within PATIENCE_S, and meet once."""
    if os.environ["HOROVOD_RANK"] == "0" and "STOPS" in os.environ:
        os.kill(os.getpid(), signal.SIGSTOP)
    comm = connect(float(os.environ["PATIENCE_S"]))
    assert os.environ["HOROVOD_GLOO_IFACE"] == "lo", "by which they reach the rendezvous; none was named"
    if comm.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(2)
    comm.agree(None)


def stops() -> None:
    """Meet twice."""
    comm = connect()
    comm.agree(None)
    comm.deadline_s = 1.0
    if comm.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    comm.agree(None)


def take_all() -> None:
    comm = connect()
    assert type(comm) is (HorovodComm if "HOROVOD_RANK" in os.environ else TorchComm)
    check(comm)
    say(f"rank {comm.rank} of {comm.size} is done")
    come_in_any_order(comm)
    say(f"rank {comm.rank} met the others {MEETINGS} times")
    miss_rank_1(comm, Path(sys.argv[1]))


def check(comm: Comm) -> None:
    """Take every collective, with rows for some peers, for none, and with an error on one rank."""
    rank, size = comm.rank, comm.size
    library = "Horovod" if isinstance(comm, HorovodComm) else "torch.distributed"
    assert comm.carrier(torch.device("cpu")) == f"Gloo by {library}"

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
    error: Exception | None = None
    try:
        comm.agree(DataError("no samples") if rank == 1 else None)
    except (DataError, RemoteRankError) as failure:
        error = failure
    assert isinstance(error, DataError if rank == 1 else RemoteRankError), error
    assert rank == 1 or str(error) == "rank 1 failed: DataError: no samples"
    check_types(comm)


def check_types(comm: Comm) -> None:
    """Send rows of every type that the trainer sends, of one number and of several; and gather uneven ones."""
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64):
        for shape in ((), (3,), (2, 2)):
            sent = torch.full((comm.size, *shape), comm.rank, dtype=dtype)
            got, _ = comm.alltoall(sent, torch.ones(comm.size, dtype=torch.int32), name="types")
            assert got.dtype == dtype and got.shape == sent.shape
            assert got.reshape(comm.size, -1)[:, 0].tolist() == list(range(comm.size))
    long = "x" * 100_000
    assert comm.broadcast_object(long if comm.rank == 2 else "", root=2) == long
    texts = comm.allgather_object(long if comm.rank == 1 else "")
    assert texts == [long if peer == 1 else "" for peer in range(comm.size)]
    assert comm.allgather(torch.zeros(0, 2), name="test").shape == (0, 2)


def come_in_any_order(comm: Comm) -> None:
    """Take collectives beside each other, begun and waited for in another order on each rank and in each round.

    As in training: sums of gradients begin in the midst of exchanges, two threads ask for keys ahead, of training and
    of an evaluation, and the first one of a name is taken while others are under way.
    """
    comm.deadline_s, draw = 30.0, random.Random(comm.rank)
    with ThreadPoolExecutor(2) as pool:
        ahead = [pool.submit(ask_ahead, comm, kind, seed) for kind, seed in (("step", 1), ("eval", 2))]
        for round_ in range(MEETINGS):
            names = draw.sample(["dense.a", "dense.b", "dense.c"], 3)
            sums = {name: torch.tensor([float(ord(name[-1])), comm.rank, round_]) for name in names}
            finish = {name: comm.start_allreduce_sum_(sums[name], name=name) for name in names[:2]}
            check_exchange(comm, "step.vectors", round_)
            finish |= {name: comm.start_allreduce_sum_(sums[name], name=name) for name in names[2:]}
            for name in draw.sample(names, 3):
                finish[name]()
                expected = [comm.size * ord(name[-1]), comm.size * (comm.size - 1) / 2, comm.size * round_]
                assert sums[name].tolist() == expected, (name, sums[name])
    for each in ahead:
        each.result()


def ask_ahead(comm: Comm, kind: str, seed: int) -> None:
    """Ask for keys, round after round, some time beside the step of other ranks."""
    draw = random.Random(10 * comm.rank + seed)
    for round_ in range(MEETINGS):
        time.sleep(draw.uniform(0, 0.01))
        check_exchange(comm, f"{kind}.keys", round_)
        comm.agree(None, name=f"{kind}.keys.agree")


def check_exchange(comm: Comm, name: str, round_: int) -> None:
    """Send each rank as many rows as it has predecessors, all of this round."""
    counts = torch.arange(comm.size, dtype=torch.int32)
    got, _ = comm.alltoall(torch.full((int(counts.sum()), 4), round_), counts, name=name)
    assert got.tolist() == [[round_] * 4] * (comm.rank * comm.size)


def miss_rank_1(comm: Comm, folder: Path) -> None:
    """Wait for rank 1 in two collectives at once, beyond the deadline, and end when both others have said so."""
    comm.deadline_s = 1.0
    if comm.rank != 1:
        ahead = threading.Thread(target=exchange, args=(comm, "step.keys"))
        ahead.start()
        exchange(comm, "step.vectors")
        ahead.join()
        assert comm.is_stuck
        comm.close()
        (folder / str(comm.rank)).touch()
    until_s = time.monotonic() + 30
    while len(list(folder.iterdir())) < comm.size - 1 and time.monotonic() < until_s:
        time.sleep(0.02)  # the end of this one ends the other ones too


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
