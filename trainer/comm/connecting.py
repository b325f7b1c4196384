"""Which ranks this process is one of: the environment says who started it."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from trainer.comm.comm import Comm
from trainer.comm.distributed import TorchComm
from trainer.comm.horovod import HorovodComm
from trainer.comm.solo import SoloComm
from trainer.errors import ConfigError

_HOROVOD = ("HOROVOD_RANK", "HOROVOD_SIZE")
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_WAY_OUT = "start all ranks by horovodrun or torchrun, or unset {found} for one rank alone"


def connect() -> Comm:
    """Return the ranks of `horovodrun` or `torchrun`, whichever started this process, else one rank alone.

    Raises ConfigError where the environment tells half of it, or Horovod is not installed.
    """
    by_horovod = _complete(_HOROVOD, signs=_HOROVOD)
    by_torchrun = _complete(_TORCHRUN, signs=("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"))
    if by_horovod and by_torchrun and "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError("horovodrun and torchrun both started this process; start one of them, not one in the other")
    if by_horovod:
        return HorovodComm()
    if by_torchrun:
        _check_numbers()
        return TorchComm()
    return SoloComm()


def launcher_of(ranks: int) -> list[str]:
    """Return the words before `-m MODULE` or a script that start ranks on this machine.

    By horovodrun where that and Horovod are installed, else by torchrun.
    """
    beside = Path(sys.executable).with_name("horovodrun")
    horovodrun = str(beside) if beside.exists() else shutil.which("horovodrun")
    if horovodrun is None or importlib.util.find_spec("horovod") is None:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [horovodrun, "-np", str(ranks), sys.executable]


def _complete(names: tuple[str, ...], signs: tuple[str, ...]) -> bool:
    """Return whether a launcher set its variables; one of `signs` says that it did."""
    found, missing = ([name for name in names if (name in os.environ) == is_set] for is_set in (True, False))
    if not any(sign in os.environ for sign in signs):
        return False
    if missing:
        raise ConfigError(
            f"{', '.join(found) or signs[-1]} is set, but not {', '.join(missing)}: " + _WAY_OUT.format(found="it")
        )
    return True


def _check_numbers() -> None:
    """Raise ConfigError unless torchrun's variables are numbers that fit."""
    rank, size, _, port = (os.environ[name] for name in _TORCHRUN)
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise ConfigError(f"RANK={rank} is not a number below WORLD_SIZE={size}: torchrun sets both")
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(f"MASTER_PORT={port} is not a port; torchrun sets it")
