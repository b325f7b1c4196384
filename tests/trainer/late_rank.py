"""Run by test_comm.py on three ranks: rank 1 never comes to two collectives at once, the others say so in time."""

import os
import sys
import threading
import time

import torch

from trainer.comm import Comm, connect
from trainer.errors import LateRankError


def exchange(comm: Comm, name: str) -> None:
    started = time.monotonic()
    try:
        comm.alltoall(torch.zeros(3, 2), torch.ones(3, dtype=torch.int32), name=name)
    except LateRankError as error:
        sys.stdout.write(f"after {time.monotonic() - started:.0f} s: {error}\n")
        sys.stdout.flush()


def main() -> None:
    comm = connect()
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


if __name__ == "__main__":
    main()
