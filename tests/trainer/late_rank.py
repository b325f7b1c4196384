"""Run by test_comm.py on three ranks: rank 1 never comes to a collective, the others say so in time."""

import os
import sys
import time

import torch

from trainer.comm import connect
from trainer.errors import LateRankError


def main() -> None:
    comm = connect()
    comm.deadline_s = 1.0
    if comm.rank == 1:
        time.sleep(60)
    started = time.monotonic()
    try:
        comm.alltoall(torch.zeros(3, 2), torch.ones(3, dtype=torch.int32), name="step.keys")
    except LateRankError as error:
        sys.stdout.write(f"after {time.monotonic() - started:.0f} s: {error}\n")
    sys.stdout.flush()
    assert comm.is_stuck
    comm.close()
    time.sleep(1)  # the other one has to be given the time to say so too
    os._exit(7)


if __name__ == "__main__":
    main()
