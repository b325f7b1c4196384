"""Adam's updates of a row in the steps that do not touch it, exactly and at once: polynomials of every step.

Letters of shapes: Q rows touched, V numbers in each, N nodes, W steps of the window.

Without a gradient, a step of Adam still moves a weight: its moments m and v shrink by beta1 and beta2, and the weight
goes by lr m_hat / (sqrt(v_hat) + eps). A row last touched in step t, with moments m and v then, has moved by step T by

    sum over s = t+1 .. T of   lr_s beta1^(s-t) m / (1 - beta1^s)  /  ( sqrt(v) c_s + eps ),
                               c_s = sqrt( beta2^(s-t) / (1 - beta2^s) ).

Only c_s keeps m / sqrt(v) from standing before the sum, and it changes little while beta1^(s-t) dies out. With a
constant c of step t, and q = sqrt(v) c / (sqrt(v) c + eps), which lies between 0 (eps alone counts) and 1 (eps is
nothing), the sum is

    m / (sqrt(v) c + eps) x Y(q),   Y(q) = sum of  w_s / (1 + q (c_s/c - 1)),   w_s = lr_s beta1^(s-t) / (1 - beta1^s).

Y depends on t and T alone. `Drift` keeps, for each t, its values at the Chebyshev nodes of [0, 1], to which a step adds
one term, and the polynomial through them. So a row's move is one polynomial of a few degrees, however long it was away.

Error: that of the polynomial, relative to the move, whatever m, v and eps. Its degree is such that the error is at most
2e-6 in float32 and 1e-13 in float64 where it is largest, in the very first steps; after 30 steps it is below rounding
(tests/trainer/ids/test_optimizers.py). Terms with beta1^(s-t) below 2^-30 or 2^-60 are left out.
"""

import math
from array import array
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from featurestore.keys import Float64Array
from featurestore.lookup.ondevice import on_device
from trainer.optim import BETA1, BETA2

DEGREE = {torch.float32: 7, torch.float64: 21}
_NEGLIGIBLE = {torch.float32: 2.0**-30, torch.float64: 2.0**-60}


class Drift:
    """The polynomials of every step so far; step 0 is that of rows that no step has touched, which do not move.

    Memory: degree + 2 numbers a step. A step costs a few operations on the steps of the last `window`.
    """

    def __init__(self, eps: float, dtype: torch.dtype, device: torch.device | str) -> None:
        self._eps, self.degree = eps, DEGREE[dtype]
        self.window = math.ceil(math.log(_NEGLIGIBLE[dtype]) / math.log(BETA1))
        """Steps after which a momentum has shrunk to nothing."""
        self._node_N = nodes(self.degree)
        self._powers = Powers(self.window)
        self._table = torch.empty(1024, self.degree + 2, dtype=dtype, device=device)  # polynomial, lowest first; c
        self._begin()

    @property
    def num_steps(self) -> int:
        """Count the steps."""
        return len(self.rates)

    def _begin(self) -> None:
        """Take the state before the first step."""
        self.rates = array("d")
        """The learning rate of each step."""
        # Of the last `window` steps, oldest first: values at the nodes, and c.
        self._values_WN, self._centre_W = np.zeros((0, self.degree + 1)), np.ones(0)
        self._table[:, :-1], self._table[:, -1] = 0, 1

    def resume(self, rates: Sequence[float]) -> None:
        """Take the state after steps with these learning rates."""
        self._begin()
        for rate in rates:
            self.add_step(rate)

    def add_step(self, rate: float) -> None:
        """Add one more step of Adam, with this learning rate."""
        self.rates.append(rate)
        step, count = self.num_steps, len(self._centre_W)
        if step + 1 > len(self._table):
            more = torch.zeros_like(self._table)
            more[:, -1] = 1
            self._table = torch.cat([self._table, more])
        if count:
            weight_W, c_W = self._powers.terms(step, count)
            self._values_WN += (rate * weight_W)[:, None] / (1 + (c_W / self._centre_W - 1)[:, None] * self._node_N)
            self._table[step - count : step, :-1].copy_(on_device(polynomials(self._values_WN), self._table.device))
        centre, kept = self._powers.centre(step), slice(max(0, count + 1 - self.window), None)
        self._values_WN = np.vstack([self._values_WN[kept], np.zeros_like(self._node_N)])
        self._centre_W = np.append(self._centre_W[kept], centre)
        self._table[step, -1] = centre

    def moved(self, weight_QV: Tensor, momentum_QV: Tensor, variance_QV: Tensor, last_Q: Tensor) -> Tensor:
        """Compute today's weights of rows that step `last_Q` has left with these weights and moments."""
        poly_QN = self._table.index_select(0, last_Q)
        scaled_QV = variance_QV.contiguous().sqrt() * poly_QN[:, -1:]  # a row's numbers lie side by side: strided
        deviation_QV = scaled_QV + self._eps
        place_QV = (scaled_QV - self._eps).div_(deviation_QV)  # 2 q - 1
        sum_QV = poly_QN[:, self.degree, None]
        for power in range(self.degree - 1, -1, -1):
            sum_QV = torch.addcmul(poly_QN[:, power, None], sum_QV, place_QV)
        return torch.addcdiv(weight_QV, sum_QV.mul_(momentum_QV), deviation_QV, value=-1)


class Powers:
    """Powers of the betas for rows touched `window` steps before to one step before."""

    def __init__(self, window: int) -> None:
        self._missed_W = np.arange(window, 0, -1, dtype=np.float64)
        self._momentum_W: Float64Array = np.power(BETA1, self._missed_W)
        self._variance_W: Float64Array = np.power(BETA2, self._missed_W)

    def terms(self, step: int, count: int) -> tuple[Float64Array, Float64Array]:
        """Compute w_s / lr_s and c_s in step `step`, of rows touched `count` steps before to one step before."""
        weight_W: Float64Array = self._momentum_W[-count:] / (1 - BETA1**step)
        c_W: Float64Array = np.sqrt(self._variance_W[-count:] / (1 - BETA2**step))
        return weight_W, c_W

    def coming(self, step: int) -> tuple[Float64Array, Float64Array]:
        """Compute w_s / lr_s and c_s of rows touched in step `step`, in the steps that follow, the last one first."""
        step_W = step + self._missed_W
        weight_W: Float64Array = self._momentum_W / (1 - np.power(BETA1, step_W))
        c_W: Float64Array = np.sqrt(self._variance_W / (1 - np.power(BETA2, step_W)))
        return weight_W, c_W

    def centre(self, step: int) -> float:
        """Compute the c of a step: the harmonic mean of all c_s that follow, each as heavy as its term."""
        weight_W, c_W = self.coming(step)
        return float(weight_W.sum()) / float((weight_W / c_W).sum())


def nodes(degree: int) -> Float64Array:
    """Return Chebyshev's nodes in [0, 1]."""
    count = degree + 1
    return np.asarray((1 + np.cos(np.pi * (np.arange(count) + 0.5) / count)) / 2)


def polynomials(values_WN: Float64Array) -> Float64Array:
    """Compute coefficients of powers of 2 q - 1, lowest first, of the polynomials through `values_WN` at the nodes.

    By way of Chebyshev's polynomials: their high coefficients are small before powers make them large, and cancel.
    """
    to_chebyshev_NN, to_powers_NN = _conversions(values_WN.shape[-1])
    return np.asarray(values_WN @ to_chebyshev_NN @ to_powers_NN)


@cache
def _conversions(count: int) -> tuple[Float64Array, Float64Array]:
    angle_N = np.pi * (np.arange(count) + 0.5) / count
    to_chebyshev_NN = np.cos(np.outer(angle_N, np.arange(count))) * (2 / count)
    to_chebyshev_NN[:, 0] /= 2
    to_powers_NN = np.zeros((count, count))
    for order in range(count):
        powers = np.polynomial.chebyshev.cheb2poly(np.eye(count)[order])
        to_powers_NN[order, : len(powers)] = powers
    return to_chebyshev_NN, to_powers_NN
