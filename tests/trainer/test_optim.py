"""The dense optimiser: one flat gradient, one allreduce, Adam, a state that resumes exactly."""

import pytest
import torch
from torch import nn

from trainer.comm import SoloComm
from trainer.errors import CheckpointError
from trainer.optim import DenseOptimizer, check_names, rates_at
from trainer.options import OptimConfig


class DoublingComm(SoloComm):
    """Two ranks with equal gradients."""

    calls = 0

    def allreduce_sum_(self, values: torch.Tensor, name: str) -> torch.Tensor:
        self.calls += 1
        return values.mul_(2)


def parameters() -> dict[str, nn.Parameter]:
    return {"a": nn.Parameter(torch.ones(2, 3)), "b": nn.Parameter(torch.ones(4))}


def step(optimizer: DenseOptimizer, comm: SoloComm, number: int = 0) -> float:
    optimizer.zero_grad()
    loss = sum((p**2 * (number + 1)).sum() for p in optimizer.parameters.values())
    loss.backward()
    return optimizer.step(comm, rates_at(OptimConfig(lr=0.1), number), loss)


def test_rates_fall_every_so_many_steps() -> None:
    config = OptimConfig(lr=0.1, lr_gamma=0.5, lr_every=10)
    assert [rates_at(config, s).lr for s in (0, 9, 10, 29)] == [0.1, 0.1, 0.05, 0.025]


def test_gradients_and_loss_are_summed_in_one_allreduce() -> None:
    optimizer, comm = DenseOptimizer(parameters(), OptimConfig()), DoublingComm()
    loss = step(optimizer, comm)
    assert comm.calls == 1
    assert loss == 2 * 10
    assert all((p.grad == 4).all() for p in optimizer.parameters.values())


def test_gradients_do_not_pile_up() -> None:
    optimizer = DenseOptimizer(parameters(), OptimConfig())
    step(optimizer, SoloComm())
    step(optimizer, SoloComm())  # Adam's first step took the parameters from 1 to 0.9
    assert all(torch.allclose(p.grad, torch.tensor(1.8)) for p in optimizer.parameters.values())


def test_moves_as_adam_does() -> None:
    mine, theirs = DenseOptimizer(parameters(), OptimConfig(lr=0.1)), parameters()
    adam = torch.optim.Adam(theirs.values(), lr=0.1)
    for number in range(5):
        step(mine, SoloComm(), number)
        adam.zero_grad()
        sum((p**2 * (number + 1)).sum() for p in theirs.values()).backward()
        adam.step()
    for name, parameter in theirs.items():
        torch.testing.assert_close(mine.parameters[name], parameter)


def test_state_resumes_exactly() -> None:
    through, first, second = (DenseOptimizer(parameters(), OptimConfig()) for _ in range(3))
    for number in range(6):
        step(through, SoloComm(), number)
    for number in range(3):
        step(first, SoloComm(), number)
    with torch.no_grad():
        for name, value in second.state().items():
            value.copy_(first.state()[name])
    for number in range(3, 6):
        step(second, SoloComm(), number)
    assert all(torch.equal(value, second.state()[name]) for name, value in through.state().items())


def test_names_and_shapes_of_a_checkpoint_are_checked() -> None:
    mine = {"a": torch.zeros(2), "b": torch.zeros(3)}
    check_names(mine, {"b": torch.ones(3), "a": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, \['b'\], and has 1 too many, \['c'\]"):
        check_names(mine, {"a": torch.zeros(2), "c": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"b has shape \(4,\) in the checkpoint and \(3,\) in this run"):
        check_names(mine, {"a": torch.zeros(2), "b": torch.zeros(4)})
