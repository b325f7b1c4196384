"""Ranks of which one stops or dies, while the other one says how it ends:  python lone.py connects|stops

connects: a rank connects; the first one dies after it, or stops before it where STOPS is set. stops: two ranks meet
once, and the first one stops before the second time.
"""

import os
import signal
import sys
import time

from featurestore.errors import UserError
from trainer.comm import connect


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


try:
    {"connects": connects, "stops": stops}[sys.argv[1]]()
except UserError as error:
    print(type(error).__name__, error, flush=True)
os._exit(7)
