"""Two ranks that meet once; the first one stops before the second time, and the other one says who is missing."""

import os
import signal

from trainer.comm import connect
from trainer.errors import LateRankError

comm = connect()
comm.agree(None)
comm.deadline_s = 1.0
if comm.rank == 0:
    os.kill(os.getpid(), signal.SIGSTOP)
try:
    comm.agree(None)
except LateRankError as error:
    print(error, flush=True)
os._exit(7)
