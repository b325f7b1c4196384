"""A rank that has found the others, says so, and stays until its folder has a file `end`."""

import sys
import time
from pathlib import Path

from trainer.comm import connect

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    comm = connect()
    assert comm.allgather_object(comm.rank, name="ranks") == list(range(comm.size))
    (folder / f"ready-{comm.rank}").touch()
    while not (folder / "end").exists():
        time.sleep(0.05)
    comm.close()
