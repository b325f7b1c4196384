"""The optimisers of ID rows in plain torch: over the whole table, or row by row. Part of the reference."""

import torch
from torch import Tensor

from trainer.config import OptimConfig


class PlainRows:
    """One table, (rows, width), and what its optimiser keeps, by the names that the engine's checkpoints use."""

    def __init__(self, weight: Tensor, optim: OptimConfig) -> None:
        self.weight, self.optim = weight, optim
        self.state = self.fresh()
        self.adam = self.dense_adam()

    def fresh(self) -> dict[str, Tensor]:
        """The state of rows that nothing has touched."""
        like = self.weight.detach()
        each, one = torch.zeros_like(like), torch.zeros(len(like), dtype=like.dtype)
        none = torch.zeros(len(like), dtype=torch.int32)
        parts = {
            "adam": {"momentum": each, "variance": each, "last_step": none, "last_weight": like},
            "rowwise_adagrad": {"sum": one},
        }
        return {name: part.clone() for name, part in parts[self.optim.ids].items()}

    def dense_adam(self) -> torch.optim.Adam:
        """torch's own, of the whole table."""
        return torch.optim.Adam([self.weight], betas=(self.optim.beta1, self.optim.beta2), eps=self.optim.eps)

    def move(self, row: int, to: int) -> None:
        """Puts a row's weights and state at another place."""
        for values in self.everything():
            values[to] = values[row]

    def clear(self, row: int) -> None:
        """The row's weights and state are zero, as those of a row that nothing has touched."""
        for values in self.everything():
            values[row] = 0

    def everything(self) -> list[Tensor]:
        """Weights, what is kept beside them, and the moments of torch's Adam, all by row."""
        of_adam = [value for value in self.adam.state[self.weight].values() if value.shape == self.weight.shape]
        return [self.weight.detach(), *self.state.values(), *of_adam]

    def step(self, touched: list[int], lr: float) -> Tensor:
        """Moves the rows by the gradient in `weight.grad`, and returns that."""
        assert self.weight.grad is not None
        gradient = self.weight.grad.clone()
        with torch.no_grad():
            if self.optim.ids == "adam":
                self.step_adam(touched, lr)
            for row in touched:
                if self.optim.ids == "rowwise_adagrad":
                    self.move_rowwise_adagrad(row, gradient[row], lr)
        return gradient

    def step_adam(self, touched: list[int], lr: float) -> None:
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        moments = self.adam.state[self.weight]
        for row in touched:
            self.state["momentum"][row] = moments["exp_avg"][row]
            self.state["variance"][row] = moments["exp_avg_sq"][row]
            self.state["last_step"][row], self.state["last_weight"][row] = int(moments["step"]), self.weight[row]

    def move_rowwise_adagrad(self, row: int, g: Tensor, lr: float) -> None:
        self.state["sum"][row] += (g**2).mean()
        self.weight[row] -= lr * g / (self.state["sum"][row].sqrt() + self.optim.eps)

    def parts(self) -> dict[str, Tensor]:
        """Weights and state, as a checkpoint has them."""
        return {"weight": self.weight.detach(), **self.state}
