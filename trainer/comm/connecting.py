"""Which ranks this process is one of: the environment says who started it."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from trainer.comm.comm import DEADLINE_S, Comm, SoloComm
from trainer.comm.distributed import TorchComm
from trainer.comm.horovod import HorovodComm
from trainer.errors import ConfigError

_HOROVOD = (
    "HOROVOD_RANK",
    "HOROVOD_SIZE",
    "HOROVOD_LOCAL_RANK",
    "HOROVOD_LOCAL_SIZE",
    "HOROVOD_CROSS_RANK",
    "HOROVOD_CROSS_SIZE",
    "HOROVOD_GLOO_RENDEZVOUS_ADDR",
    "HOROVOD_GLOO_RENDEZVOUS_PORT",
)
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_WAY_OUT = "start all ranks by horovodrun or torchrun, or unset {found} for one rank alone"


def connect(deadline_s: float = DEADLINE_S) -> Comm:
    """Return the ranks of `horovodrun` or `torchrun`, whichever started this process, else one rank alone.

    Raises ConfigError where the environment tells half of it, or Horovod is not installed, LostRankError where ranks
    have not come within `deadline_s`.
    """
    by_horovod = _complete(_HOROVOD, signs=_HOROVOD[:2])
    by_torchrun = _complete(_TORCHRUN, signs=("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"))
    if by_horovod and by_torchrun and "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError("horovodrun and torchrun both started this process; start one of them, not one in the other")
    if by_horovod:
        _check_numbers("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_GLOO_RENDEZVOUS_PORT")
        return HorovodComm(deadline_s)
    if by_torchrun:
        _check_numbers("torchrun", "RANK", "WORLD_SIZE", "MASTER_PORT")
        return TorchComm(deadline_s)
    return SoloComm(deadline_s)


def launcher_of(ranks: int) -> list[str]:
    """Return the words before `-m MODULE` or a script that start ranks on this machine.

    By horovodrun where that and Horovod are installed: without --gloo it loads torch once more, to ask for MPI. Else by
    torchrun, so that its ranks meet at rank 0's own store: that of the launcher, which we leave out, listens on all
    addresses.
    """
    beside = Path(sys.executable).with_name("horovodrun")
    horovodrun = str(beside) if beside.exists() else shutil.which("horovodrun")
    if horovodrun is None or importlib.util.find_spec("horovod") is None:
        meeting = ["--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--local-addr", "127.0.0.1"]
        torchrun = ["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", sys.executable, "-m", "torch.distributed.run"]
        return [*torchrun, *meeting, "--nproc-per-node", str(ranks)]
    return [horovodrun, "--gloo", "-np", str(ranks), sys.executable]


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


def _check_numbers(launcher: str, *names: str) -> None:
    """Raise ConfigError unless the launcher's variables of rank, number of ranks and port are numbers that fit."""
    rank, size, port = (os.environ[name] for name in names)
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise ConfigError(f"{names[0]}={rank} is not a number below {names[1]}={size}: {launcher} sets both")
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(f"{names[2]}={port} is not a port; {launcher} sets it")
