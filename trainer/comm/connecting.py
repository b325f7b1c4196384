"""Which ranks this process is one of: it says who started it."""

import os

from trainer.comm.comm import Comm
from trainer.comm.horovod import HorovodComm
from trainer.comm.solo import SoloComm


def connect() -> Comm:
    """Return Horovod's ranks where `horovodrun` started this process, else one rank alone."""
    if "HOROVOD_RANK" in os.environ or "HOROVOD_SIZE" in os.environ:
        return HorovodComm()
    return SoloComm()
