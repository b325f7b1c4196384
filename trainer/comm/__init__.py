"""Collectives between ranks: their interface, and ranks of torch.distributed and of Horovod."""

from trainer.comm.comm import Comm, SoloComm, Traffic, connect
from trainer.comm.distributed import HorovodComm, TorchComm

__all__ = ["Comm", "HorovodComm", "SoloComm", "TorchComm", "Traffic", "connect"]
