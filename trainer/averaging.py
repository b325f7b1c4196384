"""Averages of parameters over the last part of all steps, which are evaluated, saved and served in place of these."""

import torch
from torch import Tensor


class StepAverage:
    """How far an average moves in each step, and how much of it is left after many.

    Polynomial-decay averaging (Shamir and Zhang, ICML 2013, arXiv 1212.1824, section 4): in step n the average goes
    (g + 1) / (n + g) of the way to the parameters as that step leaves them. So a step counts the less the longer it is
    ago, and about the last 1 / (g + 1) of all steps count, however many there are. After the first step the average
    is its parameters; with g = 0 all steps count alike.
    """

    def __init__(self, share: float) -> None:
        """`share`: 1 / (g + 1), in (0, 1]."""
        self._gamma = 1 / share - 1
        self.num_steps = 0

    def weight_in(self, step: int) -> float:
        """Return how far the average goes in a step, the first of which is 1."""
        return (self._gamma + 1) / (step + self._gamma)

    def kept(self, since_Q: Tensor) -> Tensor:
        """Compute the share that is left now of a distance between average and parameter after step `since` (Q,).

        The parameter has stayed as it is since then: the product of 1 - weight over the steps in between, (Q,) in
        float64.

        With Gamma functions, so that it costs the same however many they are. Step 0, before the first, counts as 1.
        """
        now = torch.tensor(max(1, self.num_steps), dtype=torch.float64, device=since_Q.device)
        return torch.exp(self._log_left(now) - self._log_left(since_Q.double().clamp_(min=1)))

    def _log_left(self, step: Tensor) -> Tensor:
        return torch.lgamma(step) - torch.lgamma(step + self._gamma + 1)
