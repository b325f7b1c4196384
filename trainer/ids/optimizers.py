"""Optimisers of ID rows, and the rows they update; decay of rows not seen is exact.

Q rows touched, V numbers in each; all work on copies of these rows alone. The row's `gradient_QV` is the sum over all
ranks, of the mean loss over the global batch.

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

Error: that of the polynomial, relative to the move, whatever m, v and eps. Its degree is chosen so that the error is at
most 2e-6 in float32 and 1e-13 in float64 where it is largest, in the very first steps; after 30 steps it is below
rounding (tests/trainer/ids/test_drift.py). Terms with beta1^(s-t) below 2^-30 or 2^-60 are left out.
"""

import itertools
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featurestore.lookup.embedding import on_device
from trainer.config.options import IdOptimizer, OptimConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.optim import Rates, StepAverage

WEIGHT = "weight"


@dataclass(frozen=True)
class StatePart:
    """What an optimiser keeps of a row: a number for each of its weights, one number, or one count (int32)."""

    name: str
    kind: Literal["vector", "number", "count"]

    def numbers(self, width: int) -> int:
        """Count the numbers that it takes of a row whose vector has `width`; a count has the room of a number."""
        return width if self.kind == "vector" else 1

    def view(self, numbers_NK: Tensor) -> Tensor:
        """View the numbers (N, K) of this part as what they are: (N, V), or (N,)."""
        if self.kind == "vector":
            return numbers_NK
        return (numbers_NK.view(torch.int32) if self.kind == "count" else numbers_NK)[:, 0]


_WEIGHT = StatePart(WEIGHT, "vector")


class IdRows:
    """N rows, all numbers of one row side by side: it is found in memory once, and not once for each of its parts."""

    def __init__(self, block_NW: Tensor, width: int, state: Sequence[StatePart]) -> None:
        """`block_NW`: of each row its weights, then what `state` says."""
        self.block_NW, self.width, self.state = block_NW, width, state
        every = (_WEIGHT, *state)
        pieces = torch.split(block_NW, [part.numbers(width) for part in every], dim=1)
        self.parts: Mapping[str, Tensor] = {
            part.name: part.view(piece) for part, piece in zip(every, pieces, strict=True)
        }
        """Views by name: `weight` (N, V), and the parts of an optimiser's state, each (N, V) or (N,)."""

    @classmethod
    def zeros(
        cls, num_rows: int, width: int, state: Sequence[StatePart], device: torch.device | str, dtype: torch.dtype
    ) -> "IdRows":
        """Make `num_rows` rows of zeros, never touched.

        On a CPU the system hands out memory when it is first written to: rows that nothing has touched take none."""
        shape = num_rows, numbers_of(width, state)
        if num_rows and torch.device(device).type == "cpu":  # torch.zeros writes
            block_NW = torch.from_numpy(np.zeros(shape, torch.empty(0, dtype=dtype).numpy().dtype))
        else:
            block_NW = torch.zeros(shape, dtype=dtype, device=device)
        return cls(block_NW, width, state)

    @property
    def weight(self) -> Tensor:
        """(N, V); see `RowOptimizer.current` for what it is worth."""
        return self.parts[WEIGHT]

    def narrow(self, first: int, count: int) -> "IdRows":
        """View neighbouring rows."""
        return IdRows(self.block_NW.narrow(0, first, count), self.width, self.state)

    def take(self, rows_Q: Tensor) -> "IdRows":
        """Copy chosen rows."""
        return IdRows(self.block_NW.index_select(0, rows_Q), self.width, self.state)

    def put(self, rows_Q: Tensor, rows: "IdRows") -> None:
        """Write rows to places `rows_Q`, all different."""
        self.block_NW.index_put_((rows_Q,), rows.block_NW)


def numbers_of(width: int, state: Sequence[StatePart]) -> int:
    """Count the numbers of a row: its weights, and what an optimiser keeps of it."""
    return sum(part.numbers(width) for part in (_WEIGHT, *state))


def row_bytes(width: int, state: Sequence[StatePart], dtype: torch.dtype) -> int:
    """Compute the bytes of a row and of its optimiser's state."""
    return numbers_of(width, state) * dtype.itemsize


LAST_WEIGHT = "last_weight"
"""Name in a checkpoint of the weights as the last step that touched the row left them, where `weight` is newer."""
SHARED_STATE = "ids/"
"""How names of what a checkpoint has of the optimiser beside the rows begin."""
_STEPS = StatePart("steps", "count")
_RATES = f"{SHARED_STATE}learning_rates"
_AVERAGED_STEPS = f"{SHARED_STATE}averaged_steps"
_LAG = StatePart("average_lag", "vector")
"""Average minus weight, as the last step that touched the row left them: zero of rows that none has touched."""
_AVERAGED_AT = StatePart("averaged_at", "count")


class RowOptimizer:
    """Leaves rows as they are: what evaluation needs. One object serves all tables of a rank."""

    state: tuple[StatePart, ...] = ()
    drifts: ClassVar[bool] = False
    """Whether steps move rows that they do not touch."""

    def __init__(self, config: OptimConfig) -> None:
        self._config = config
        self.state = type(self).state_with(config)
        self.average = StepAverage(config.average_share) if _LAG in self.state else None
        self.reads_average = False
        """Whether `read` gives averages."""

    @classmethod
    def state_with(cls, config: OptimConfig) -> tuple[StatePart, ...]:
        """List the state that is kept of a row together with its weights.

        Adaptive L2 needs the number of its steps, an average how far it is away.
        """
        if not cls.state:
            return ()
        counts = (_STEPS,) if config.id_l2 and _STEPS not in cls.state else ()
        averages = (_LAG, _AVERAGED_AT) if config.average_share else ()
        return (*cls.state, *counts, *averages)

    @property
    def lags(self) -> bool:
        """Whether weights in memory may be others than `result`."""
        return self.drifts or self.average is not None

    def current(self, rows: IdRows) -> Tensor:
        """Return the weights (Q, V) of these rows as they are now; a view where no step moves rows beside its own."""
        return rows.weight

    def result(self, rows: IdRows) -> Tensor:
        """Return what these rows are worth outside of training (Q, V): averages where they have such, else weights.

        Where a row was last touched some steps ago, it counts in the average as it is now for all of these.
        """
        weight_QV = self.current(rows)
        return weight_QV if self.average is None else self._averages(rows, weight_QV, self.average)

    def read(self, rows: IdRows) -> Tensor:
        """Return what a batch is to see of these rows (Q, V)."""
        return self.result(rows) if self.reads_average else self.current(rows)

    @torch.no_grad()
    def step(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> None:
        """Move copies of the rows that the step touches, whose weights now are `weight_QV`, and their state.

        With `id_l2`, the adaptive L2 of DIN (Zhou et al., arXiv 1706.06978, section 5.1): id_l2 / n x the row is added
        to its gradient, in steps that touch the row alone. n is the number of steps that touched it so far, this one
        included. DIN takes the row's samples in the whole data for n, which nobody knows while the data still come;
        counted in steps, the shares 1 / n of a pass over known data add up to one L2 a row, as theirs do before they
        are approximated, and a row's owner has the number at hand, the same for any number of ranks.
        """
        average_QV = None if self.average is None else self._averages(rows, weight_QV, self.average)
        if _STEPS in self.state:
            rows.parts[_STEPS.name].add_(1)
        if self._config.id_l2:
            share_Q = self._config.id_l2 / rows.parts[_STEPS.name].to(weight_QV.dtype)
            gradient_QV = gradient_QV + weight_QV * share_Q.unsqueeze(1)
        weight_QV = self._move(rows, weight_QV, gradient_QV, rates)
        if self.average is not None and average_QV is not None:
            number = self.average.num_steps + 1
            rows.parts[_LAG.name].copy_((average_QV - weight_QV) * (1 - self.average.weight_in(number)))
            rows.parts[_AVERAGED_AT.name].fill_(number)
        rows.weight.copy_(weight_QV)

    def end_step(self, rates: Rates) -> None:
        """End the step, with or without rows; every rank calls it."""
        if self.average is not None:
            self.average.num_steps += 1

    def restart(self) -> None:
        """Begin all rows anew, with zero as their state."""
        if self.average is not None:
            self.average.num_steps = 0

    def shared_state(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs beside the rows: the same on every rank."""
        return {} if self.average is None else {_AVERAGED_STEPS: torch.tensor(self.average.num_steps)}

    def load_shared_state(self, state: Mapping[str, Tensor]) -> None:
        """Take `shared_state` out of `state`. Raises CheckpointError where it is not there."""
        if self.average is not None:
            if _AVERAGED_STEPS not in state:
                raise CheckpointError("the checkpoint has no averages of ID rows; set optim.average_share as it was")
            self.average.num_steps = int(state[_AVERAGED_STEPS])

    def _averages(self, rows: IdRows, weight_QV: Tensor, average: StepAverage) -> Tensor:
        """Compute the averages (Q, V) of these rows, whose weights now are `weight_QV`."""
        kept_Q = average.kept(rows.parts[_AVERAGED_AT.name]).to(weight_QV.dtype)
        return weight_QV + (rows.weight + rows.parts[_LAG.name] - weight_QV) * kept_Q.unsqueeze(1)

    def _move(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> Tensor:
        """Change the state of these rows in place; return the new weights."""
        raise AssertionError("these rows are read and not trained")


class Adam(RowOptimizer):
    """Adam with moments of each weight, which shrink in every step: as torch.optim.Adam on the whole table.

    A row is moved by the steps that touch it; when it is read, it makes up for the others. Its
    weight in memory is that after step `last_step`, its last; what a lookup, a checkpoint or an export gets is newer.
    """

    state = (StatePart("momentum", "vector"), StatePart("variance", "vector"), StatePart("last_step", "count"))
    drifts = True

    def __init__(self, config: OptimConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        """Raises ConfigError for betas that do not fit the type."""
        super().__init__(config)
        self._drift = Drift(config.beta1, config.beta2, config.eps, dtype, device)

    def current(self, rows: IdRows) -> Tensor:
        parts = rows.parts
        return self._drift.moved(rows.weight, parts["momentum"], parts["variance"], parts["last_step"])

    def _move(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> Tensor:
        config, number, parts = self._config, self._drift.num_steps + 1, rows.parts
        steps_Q = (number - parts["last_step"]).double()
        momentum_QV = parts["momentum"].mul_(_power(config.beta1, steps_Q, weight_QV.dtype))
        momentum_QV.add_(gradient_QV, alpha=1 - config.beta1)
        variance_QV = parts["variance"].mul_(_power(config.beta2, steps_Q, weight_QV.dtype))
        variance_QV.addcmul_(gradient_QV, gradient_QV, value=1 - config.beta2)
        parts["last_step"].fill_(number)
        deviation_QV = variance_QV.sqrt().mul_(1 / math.sqrt(1 - config.beta2**number)).add_(config.eps)
        return torch.addcdiv(weight_QV, momentum_QV, deviation_QV, value=-rates.ids_lr / (1 - config.beta1**number))

    def end_step(self, rates: Rates) -> None:
        super().end_step(rates)
        self._drift.add_step(rates.ids_lr)

    def restart(self) -> None:
        super().restart()
        self._drift.restart()

    def shared_state(self) -> dict[str, Tensor]:
        return super().shared_state() | {_RATES: torch.tensor(self._drift.rates, dtype=torch.float64)}

    def load_shared_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_shared_state(state)
        if _RATES not in state:
            raise CheckpointError("the checkpoint has no learning rates of ID rows; set optim.ids as it was")
        self._drift.resume(state[_RATES].tolist())


class RowwiseAdam(RowOptimizer):
    """Adam with one second moment a row, the running mean of the squared gradient over it.

    It is FBGEMM's PARTIAL_ROWWISE_ADAM. Steps that do not touch a row count for nothing: bias is corrected by those
    that do.
    """

    state = (StatePart("momentum", "vector"), StatePart("variance", "number"), _STEPS)

    def _move(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> Tensor:
        config, parts = self._config, rows.parts
        momentum_QV = parts["momentum"].lerp_(gradient_QV, 1 - config.beta1)
        variance_Q = parts["variance"].lerp_(gradient_QV.square().mean(1), 1 - config.beta2)
        count_Q = parts["steps"].to(variance_Q.dtype)
        deviation_Q = (variance_Q / (1 - config.beta2**count_Q)).sqrt_().add_(config.eps)
        step_Q = rates.ids_lr / (1 - config.beta1**count_Q) / deviation_Q
        return weight_QV - momentum_QV * step_Q.unsqueeze(1)


class Adagrad(RowOptimizer):
    """Adagrad (Duchi et al., JMLR 2011), as torch.optim.Adagrad: the step shrinks with the sum of squared gradients."""

    state = (StatePart("sum", "vector"),)

    def _move(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> Tensor:
        sum_QV = rows.parts["sum"].addcmul_(gradient_QV, gradient_QV)
        return torch.addcdiv(weight_QV, gradient_QV, sum_QV.sqrt().add_(self._config.eps), value=-rates.ids_lr)


class RowwiseAdagrad(RowOptimizer):
    """Adagrad with one sum a row, of the mean squared gradient over it (FBGEMM's EXACT_ROWWISE_ADAGRAD)."""

    state = (StatePart("sum", "number"),)

    def _move(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> Tensor:
        sum_Q = rows.parts["sum"].add_(gradient_QV.square().mean(1))
        step_Q = rates.ids_lr / sum_Q.sqrt().add_(self._config.eps)
        return weight_QV - gradient_QV * step_Q.unsqueeze(1)


FTRL_BETA = 1.0
"""As McMahan et al. take it; with 0, a weight without any gradient so far would be 0 / 0."""


class Ftrl(RowOptimizer):
    """FTRL-Proximal by coordinate (McMahan et al., "Ad Click Prediction", KDD 2013, algorithm 1, without L1 and L2).

    alpha is optim.ids_lr itself: a weight is a function of alpha and of the sums, so a schedule would move weights
    without a gradient. The sums of a row begin so that its first value is theirs.
    """

    state = (StatePart("linear", "vector"), StatePart("sum", "vector"))

    def _move(self, rows: IdRows, weight_QV: Tensor, gradient_QV: Tensor, rates: Rates) -> Tensor:
        alpha, linear_QV, sum_QV = self._config.alpha, rows.parts["linear"], rows.parts["sum"]
        started_QV = weight_QV * -(FTRL_BETA / alpha)
        is_new_Q = ~(sum_QV.any(1) | linear_QV.any(1))
        linear_QV.copy_(torch.where(is_new_Q.unsqueeze(1), started_QV, linear_QV))
        root_QV = sum_QV.sqrt()
        sum_QV.addcmul_(gradient_QV, gradient_QV)
        new_root_QV = sum_QV.sqrt()
        linear_QV.add_(gradient_QV).addcmul_(new_root_QV - root_QV, weight_QV, value=-1 / alpha)
        return -linear_QV / ((new_root_QV + FTRL_BETA) / alpha)


_PLAIN: Mapping[IdOptimizer, type[RowOptimizer]] = {
    "rowwise_adam": RowwiseAdam,
    "adagrad": Adagrad,
    "rowwise_adagrad": RowwiseAdagrad,
    "ftrl": Ftrl,
}


def row_optimizer(config: OptimConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> RowOptimizer:
    """Make the optimiser that optim.ids names. Raises ConfigError where it cannot have these settings."""
    if config.ids == "adam":
        return Adam(config, dtype, device)
    return _PLAIN[config.ids](config)


def state_of(config: OptimConfig) -> Sequence[StatePart]:
    """List what the optimiser that optim.ids names keeps of a row."""
    return (Adam if config.ids == "adam" else _PLAIN[config.ids]).state_with(config)


def _power(beta: float, steps_Q: Tensor, dtype: torch.dtype) -> Tensor:
    """beta^steps (Q, 1), by float64's exp, which is quick; a base rounded to float32 would tell after some steps."""
    return torch.exp(steps_Q * (math.log(beta) if beta else -math.inf)).to(dtype).unsqueeze(1)


TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
_MOST_DEGREES = 40
_NEGLIGIBLE = {torch.float32: 2.0**-30, torch.float64: 2.0**-60}
_LONGEST_WINDOW = 20_000
_STEP_COUNTS = (1, 2, 5, 20, 100, 1000, 20_000)  # where errors are looked at

Floats = NDArray[np.float64]


class Drift:
    """The polynomials of every step so far; step 0 is that of rows that no step has touched, which do not move.

    Memory: degree + 2 numbers a step. A step costs a few operations on the steps of the last `window`.
    """

    def __init__(self, beta1: float, beta2: float, eps: float, dtype: torch.dtype, device: torch.device | str) -> None:
        """Raises ConfigError for betas with which moves are not found exactly."""
        self._eps = eps
        self.window, self.degree = window_of(beta1, dtype), degree_of(beta1, beta2, dtype)
        self._node_N = _nodes(self.degree)
        self._powers = _Powers(beta1, beta2, self.window)
        self._table = torch.empty(1024, self.degree + 2, dtype=dtype, device=device)  # polynomial, lowest first; c
        self.restart()

    @property
    def num_steps(self) -> int:
        """Steps since the start, or the restart."""
        return len(self.rates)

    def restart(self) -> None:
        """Return to the state before the first step: the rows have begun anew."""
        self.rates = array("d")
        """The learning rate of each step."""
        # Of the last `window` steps, oldest first, at the end of what is in use: values at the nodes, and c.
        self._values_WN, self._centre_W = np.zeros((2 * self.window, self.degree + 1)), np.ones(2 * self.window)
        self._end = 0
        self._table[:, :-1], self._table[:, -1] = 0, 1

    def resume(self, rates: Sequence[float]) -> None:
        """Take the state after steps with these learning rates."""
        self.restart()
        for rate in rates:
            self.add_step(rate)

    def add_step(self, rate: float) -> None:
        """Add one more step of Adam, with this learning rate."""
        self.rates.append(rate)
        step, count = self.num_steps, min(self.num_steps - 1, self.window)
        self._reserve(step + 1)
        last = self._end
        if count:
            first = last - count
            weight_W, c_W = self._powers.terms(step, count)
            values_WN, centre_W = self._values_WN[first:last], self._centre_W[first:last]
            values_WN += (rate * weight_W)[:, None] / (1 + (c_W / centre_W - 1)[:, None] * self._node_N)
            self._table[step - count : step, :-1].copy_(on_device(_polynomials(values_WN), self._table.device))
        if last == len(self._values_WN):
            kept = self.window - 1
            self._values_WN[:kept], self._centre_W[:kept] = (
                self._values_WN[last - kept :],
                self._centre_W[last - kept :],
            )
            last = kept
        self._values_WN[last], self._centre_W[last] = 0, self._powers.centre(step)
        self._table[step, -1] = float(self._centre_W[last])
        self._end = last + 1

    def moved(self, weight_QV: Tensor, momentum_QV: Tensor, variance_QV: Tensor, last_Q: Tensor) -> Tensor:
        """Compute today's weights of rows that step `last_Q` has left with these weights and moments."""
        poly_QN = self._table.index_select(0, last_Q)
        scaled_QV = variance_QV.sqrt() * poly_QN[:, -1:]
        deviation_QV = scaled_QV + self._eps
        place_QV = (scaled_QV - self._eps).div_(deviation_QV)  # 2 q - 1
        sum_QV = poly_QN[:, self.degree, None]
        for power in range(self.degree - 1, -1, -1):
            sum_QV = torch.addcmul(poly_QN[:, power, None], sum_QV, place_QV)
        return torch.addcdiv(weight_QV, sum_QV.mul_(momentum_QV), deviation_QV, value=-1)

    def _reserve(self, steps: int) -> None:
        if steps > len(self._table):
            more = torch.zeros_like(self._table)
            more[:, -1] = 1
            self._table = torch.cat([self._table, more])


def window_of(beta1: float, dtype: torch.dtype) -> int:
    """Find after how many steps beta1 has shrunk a momentum to nothing. Raises ConfigError where they are too many."""
    window = 1 if beta1 == 0 else math.ceil(math.log(_NEGLIGIBLE[dtype]) / math.log(beta1))
    if window > _LONGEST_WINDOW:
        raise ConfigError(f"optim.beta1={beta1}: with optim.ids=adam it should be at most 0.998; lower it")
    return window


class _Powers:
    """Powers of the betas for rows touched `window` steps before to one step before."""

    def __init__(self, beta1: float, beta2: float, window: int) -> None:
        self._beta1, self._beta2 = beta1, beta2
        self._missed_W = np.arange(window, 0, -1, dtype=np.float64)
        self._momentum_W: Floats = np.power(beta1, self._missed_W)
        self._variance_W: Floats = np.power(beta2, self._missed_W)

    def terms(self, step: int, count: int) -> tuple[Floats, Floats]:
        """w_s / lr_s and c_s in step `step`, of rows touched `count` steps before to one step before."""
        weight_W: Floats = self._momentum_W[-count:] / (1 - self._beta1**step)
        c_W: Floats = np.sqrt(self._variance_W[-count:] / (1 - self._beta2**step))
        return weight_W, c_W

    def coming(self, step: int) -> tuple[Floats, Floats]:
        """w_s / lr_s and c_s of rows touched in step `step`, in the steps that follow, the last one first."""
        step_W = step + self._missed_W
        weight_W: Floats = self._momentum_W / (1 - np.power(self._beta1, step_W))
        c_W: Floats = np.sqrt(self._variance_W / (1 - np.power(self._beta2, step_W)))
        return weight_W, c_W

    def centre(self, step: int) -> float:
        """Compute the c of a step: the harmonic mean of all c_s that follow, each as heavy as its term."""
        weight_W, c_W = self.coming(step)
        total = float(weight_W.sum())
        return total / float((weight_W / c_W).sum()) if total else 1.0


def polynomial_error(beta1: float, beta2: float, dtype: torch.dtype, degree: int, step: int, missed: int) -> float:
    """Find the largest error of the polynomial, relative to Y(q), of a row that missed `missed` steps after `step`."""
    powers = _Powers(beta1, beta2, window_of(beta1, dtype))
    weight_W, c_W = (each[-missed:] for each in powers.coming(step))
    spread_W = c_W / powers.centre(step) - 1

    def values(node_N: Floats) -> Floats:
        return np.asarray(weight_W @ (1 / (1 + spread_W[:, None] * node_N)))

    place_N = np.linspace(-1, 1, 101)
    exact_N = values((1 + place_N) / 2)
    found_N = np.polynomial.polynomial.polyval(place_N, _polynomials(values(_nodes(degree))))
    return float(np.abs(found_N / exact_N - 1).max())


@cache
def degree_of(beta1: float, beta2: float, dtype: torch.dtype) -> int:
    """Find the smallest degree with which no error is above TOLERANCE. Raises ConfigError where there is none."""
    if beta1 == 0:
        return 1  # without momentum nothing moves
    with np.errstate(all="ignore"):
        for degree in range(3, _MOST_DEGREES):
            cases = itertools.product(_STEP_COUNTS, _STEP_COUNTS)
            if all(polynomial_error(beta1, beta2, dtype, degree, *case) <= TOLERANCE[dtype] for case in cases):
                return degree
    raise ConfigError(
        f"optim.beta1={beta1} and optim.beta2={beta2}: with optim.ids=adam the moves of rows between two steps that "
        "touch them would not be exact; take betas nearer to 0.9 and 0.999, or optim.ids=rowwise_adam"
    )


def _nodes(degree: int) -> Floats:
    """Chebyshev's, in [0, 1]."""
    count = degree + 1
    return np.asarray((1 + np.cos(np.pi * (np.arange(count) + 0.5) / count)) / 2)


def _polynomials(values_WN: Floats) -> Floats:
    """Coefficients of powers of 2 q - 1, lowest first, of the polynomials through `values_WN` at the nodes.

    By way of Chebyshev's polynomials: their high coefficients are small before powers make them large, and cancel.
    """
    to_chebyshev_NN, to_powers_NN = _conversions(values_WN.shape[-1])
    return np.asarray(values_WN @ to_chebyshev_NN @ to_powers_NN)


@cache
def _conversions(count: int) -> tuple[Floats, Floats]:
    angle_N = np.pi * (np.arange(count) + 0.5) / count
    to_chebyshev_NN = np.cos(np.outer(angle_N, np.arange(count))) * (2 / count)
    to_chebyshev_NN[:, 0] /= 2
    to_powers_NN = np.zeros((count, count))
    for order in range(count):
        powers = np.polynomial.chebyshev.cheb2poly(np.eye(count)[order])
        to_powers_NN[order, : len(powers)] = powers
    return to_chebyshev_NN, to_powers_NN
