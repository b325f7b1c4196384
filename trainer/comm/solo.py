"""A rank alone: the stand-in for ranks where nobody started several."""

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.comm.comm import DEADLINE_S, Comm, Object


class SoloComm(Comm):
    """One rank alone: every collective returns what it was given."""

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        super().__init__(deadline_s)
        self.rank, self.size, self.moves_cuda_tensors = 0, 1, True

    def alltoall(self, rows_N: Tensor, splits_P: Tensor, name: str) -> tuple[Tensor, Tensor]:
        return rows_N, splits_P

    def start_allreduce_sum_(self, values: Tensor, name: str) -> Callable[[], None]:
        return _nothing

    def allgather(self, rows_N: Tensor, name: str) -> Tensor:
        return rows_N

    def allgather_object(self, value: Object, name: str = "objects") -> list[Object]:
        return [value]

    def broadcast_object(self, value: Object, root: int = 0) -> Object:
        return value

    def carrier(self, device: torch.device) -> str | None:
        return None

    def close(self) -> None:
        pass


def _nothing() -> None:
    """End a collective of one rank."""
