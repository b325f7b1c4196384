"""Collectives between ranks: their interface, and one file for each implementation."""

from trainer.comm.comm import Comm, SoloComm, Traffic, connect
from trainer.comm.distributed import TorchComm
from trainer.comm.horovod import HorovodComm

__all__ = ["Comm", "HorovodComm", "SoloComm", "TorchComm", "Traffic", "connect"]
