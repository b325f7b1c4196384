"""The dense optimiser: flat gradients, an allreduce for each part, Adam, a state that resumes exactly."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from trainer.comm import SoloComm
from trainer.config import OptimConfig
from trainer.errors import CheckpointError
from trainer.ids.shards import check_names
from trainer.optim import DenseOptimizer, rates_at


class DoublingComm(SoloComm):
    """Two ranks with equal gradients; `calls` names what began, and whether backward was over by then."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 2
        self.is_backward = False
        self.calls: list[tuple[str, bool]] = []

    def start_allreduce_sum_(self, values: torch.Tensor, name: str) -> Callable[[], None]:
        self.calls.append((name, self.is_backward))
        return lambda: values.mul_(2)


def step(optimizer: DenseOptimizer, comm: DoublingComm) -> float:
    optimizer.zero_grad()
    loss = sum((p**2).sum() for p in optimizer.parameters.values())
    optimizer.note(loss)
    comm.is_backward = True
    loss.backward()
    comm.is_backward = False
    optimizer.start_reduction()
    summed, _ = optimizer.outcome()
    optimizer.finish_reduction()
    optimizer.step(rates_at(OptimConfig(lr=0.1), 0), 1)
    return summed


def test_both_rates_fall_every_so_many_steps_and_evaluations_no_better_and_warm_up_evenly() -> None:
    config = OptimConfig(lr=0.1, ids_lr=0.4, lr_gamma=0.5, lr_every=10, plateau_gamma=0.2)
    assert [rates_at(config, s).lr for s in (0, 9, 10, 29)] == [0.1, 0.1, 0.05, 0.025]
    rates = rates_at(config, 10, 2)
    assert (rates.lr, rates.ids_lr) == pytest.approx((0.1 * 0.5 * 0.04, 0.4 * 0.5 * 0.04))
    config = OptimConfig(lr=0.1, ids_lr=0.4, warmup_steps=4, lr_gamma=0.5, lr_every=2)
    shares = [0.25, 0.5, 0.75 * 0.5, 0.5, 0.25]
    assert [rates_at(config, s).lr for s in range(5)] == pytest.approx([0.1 * share for share in shares])
    assert [rates_at(config, s).ids_lr for s in range(5)] == pytest.approx([0.4 * share for share in shares])


def test_gradients_and_loss_are_summed_part_by_part() -> None:
    comm = DoublingComm()
    parameters = {"model.a": nn.Parameter(torch.ones(2, 3)), "stores.b": nn.Parameter(torch.ones(4))}
    optimizer = DenseOptimizer(comm, parameters, OptimConfig())
    for _ in range(2):
        comm.calls.clear()
        for each in parameters.values():
            each.data.fill_(1)
        loss = step(optimizer, comm)
        assert comm.calls == [("step.dense.model", True), ("step.dense.stores", False)]
        assert loss == 2 * 10
        assert all((p.grad == 4).all() for p in optimizer.parameters.values())


def test_names_and_shapes_of_a_checkpoint_are_checked() -> None:
    mine = {"a": torch.zeros(2), "b": torch.zeros(3)}
    check_names(mine, {"b": torch.ones(3), "a": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, \['b'\], and has 1 too many, \['c'\]"):
        check_names(mine, {"a": torch.zeros(2), "c": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"b has shape \(4,\) in the checkpoint and \(3,\) in this run"):
        check_names(mine, {"a": torch.zeros(2), "b": torch.zeros(4)})
