"""Optimisers of ID rows: each against its plain form on the whole table, step by step; Adam against torch's own.

The dense optimiser: its rates, flat gradients, and an allreduce for each part.
"""

import itertools
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featurestore.keys import Float64Array
from tests.trainer.checkpoints import assert_same_tensors
from tests.trainer.ids.exact_tables import PlainRows
from trainer.comm import SoloComm
from trainer.config import IdOptimizer, OptimConfig
from trainer.ids.drift import DEGREE, Drift, Powers, nodes, polynomials
from trainer.ids.optimizers import row_optimizer, state_of
from trainer.ids.shards import IdRows, row_bytes
from trainer.optim import BETA1, BETA2, DenseOptimizer, rates_at

ROWS, WIDTH, STEPS = 30, 4, 300
SCHEDULE = {"ids_lr": 0.02, "lr_gamma": 0.7, "lr_every": 40, "warmup_steps": 60}


class Table:
    """Rows that an optimiser of ours moves, and the same table as torch's dense optimisers have it."""

    def __init__(self, dtype: torch.dtype = torch.float64, **settings: Any) -> None:
        self.config = OptimConfig(**{**SCHEDULE, **settings})
        self.optimizer = row_optimizer(self.config, dtype)
        self.rows = IdRows.zeros(ROWS, WIDTH, self.optimizer.state, "cpu", dtype)
        draw = np.random.default_rng(1)
        self.rows.weight.copy_(torch.from_numpy(draw.normal(0, 0.05, (ROWS, WIDTH))))
        self.dense = self.now().clone().requires_grad_()
        self.num_steps = 0

    def now(self) -> Tensor:
        """All rows as a reader would get them."""
        return self.optimizer.current(self.rows).clone()

    def step(self, rows_Q: Tensor, gradient_QV: Tensor) -> None:
        """One step with these gradients; those of all other rows are zero."""
        rates, dtype = rates_at(self.config, self.num_steps), self.rows.weight.dtype
        self.dense.grad = torch.zeros_like(self.dense)
        self.dense.grad[rows_Q] = gradient_QV.to(dtype)
        if len(rows_Q):
            taken = self.rows.take(rows_Q)
            self.optimizer.step(taken, self.optimizer.current(taken).clone(), gradient_QV.to(dtype), rates)
            self.rows.put(rows_Q, taken)
        self.optimizer.end_step(rates)
        self.num_steps += 1


def drawn_steps(seed: int, steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """Touched rows and gradients: some rows in most steps, some in few, the last two in none or one, pauses of hundreds
    of steps; gradients of all sizes, many below Adam's eps, some zero."""
    draw = np.random.default_rng(seed)
    chance_N = np.geomspace(0.8, 0.002, ROWS)
    chance_N[-1] = 0
    made = []
    for step in range(steps):
        pause = 60 <= step < 260
        rows_Q = np.flatnonzero(draw.random(ROWS) < chance_N * (0.02 if pause else 1))
        size_Q = 10.0 ** draw.uniform(-11, 0, (len(rows_Q), 1))
        gradient_QV = draw.normal(size=(len(rows_Q), WIDTH)) * size_Q * (draw.random((len(rows_Q), WIDTH)) < 0.9)
        made.append((torch.from_numpy(rows_Q), torch.from_numpy(gradient_QV)))
    return made


def torch_adam(table: Table) -> Callable[[], None]:
    config = table.config
    adam = torch.optim.Adam([table.dense], lr=1.0, betas=(BETA1, BETA2), eps=config.eps)

    def step() -> None:
        adam.param_groups[0]["lr"] = rates_at(config, table.num_steps - 1).ids_lr
        adam.step()

    return step


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("settings", [{}, {"eps": 1e-3}, {"lr_gamma": 1.0, "warmup_steps": 0}])
def test_every_row_after_every_step_is_that_of_torch_on_the_whole_table(seed: int, settings: dict[str, float]) -> None:
    """All settings on one drawing of steps in `make test`, on another one in `make test-slow`."""
    table = Table(ids="adam", **settings)
    dense_step = torch_adam(table)
    for rows_Q, gradient_QV in drawn_steps(seed):
        table.step(rows_Q, gradient_QV)
        dense_step()
        torch.testing.assert_close(table.now(), table.dense.detach(), rtol=0, atol=2e-13)


@pytest.mark.long
def test_float32_is_about_as_near_as_torch_in_float32() -> None:
    table, exact = Table(torch.float32, ids="adam"), Table(ids="adam")
    exact.rows.weight.copy_(table.rows.weight)
    dense_step = torch_adam(table)
    ours = theirs = 0.0
    for rows_Q, gradient_QV in drawn_steps(0):
        for each in (table, exact):
            each.step(rows_Q, gradient_QV)
        dense_step()
        ours = max(ours, float((table.now() - exact.now()).abs().max()))
        theirs = max(theirs, float((table.dense.detach() - exact.now()).abs().max()))
    assert 0 < ours < 3 * theirs < 1e-5  # of moves that add up to about 1


def test_reading_changes_nothing() -> None:
    read, unread = Table(ids="adam"), Table(ids="adam")
    for rows_Q, gradient_QV in drawn_steps(0, 50):
        read.now()
        for table in (read, unread):
            table.step(rows_Q, gradient_QV)
    assert_same_tensors(read.rows.parts, unread.rows.parts)


@pytest.mark.parametrize("ids", [each for each in get_args(IdOptimizer) if each != "adam"])
def test_it_is_its_plain_form(ids: Any) -> None:
    """Optimisers that leave rows alone which a step does not touch, against a loop over touched rows."""
    table = Table(ids=ids)
    plain = PlainRows(table.dense, table.config)
    for number, (rows_Q, gradient_QV) in enumerate(drawn_steps(0, 150)):
        table.step(rows_Q, gradient_QV)
        plain.step(rows_Q.tolist(), rates_at(table.config, number).ids_lr)
        torch.testing.assert_close(table.now(), table.dense.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("ids", get_args(IdOptimizer))
def test_each_keeps_what_its_plain_form_does(ids: Any) -> None:
    config = OptimConfig(ids=ids)
    kept = PlainRows(torch.zeros(1, 12), config).state
    numbers = sum(part.numel() for name, part in kept.items() if name != "last_weight")
    assert row_bytes(12, state_of(config), torch.float32) == 4 * (12 + numbers)
    assert row_optimizer(config, torch.float32).state == state_of(config)


TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
COUNTS = (1, 2, 3, 7, 30, 300, 5_000, 100_000)


def polynomial_error(dtype: torch.dtype, degree: int, step: int, missed: int) -> float:
    """The largest error of the polynomial, relative to Y(q), of a row that missed so many steps after this one."""
    powers = Powers(Drift(1e-8, dtype, "cpu").window)
    weight_W, c_W = (each[-missed:] for each in powers.coming(step))
    spread_W = c_W / powers.centre(step) - 1

    def values(node_N: Float64Array) -> Float64Array:
        return np.asarray(weight_W @ (1 / (1 + spread_W[:, None] * node_N)))

    place_N = np.linspace(-1, 1, 101)
    found_N = np.polynomial.polynomial.polyval(place_N, polynomials(values(nodes(degree))))
    return float(np.abs(found_N / values((1 + place_N) / 2) - 1).max())


@pytest.mark.parametrize("dtype", DEGREE)
def test_the_degree_is_what_the_tolerance_needs(dtype: torch.dtype) -> None:
    """After thirty steps the error is below rounding."""
    cases = list(itertools.product(COUNTS, COUNTS))
    assert max(polynomial_error(dtype, DEGREE[dtype], *case) for case in cases) <= 2 * TOLERANCE[dtype]
    assert max(polynomial_error(dtype, DEGREE[dtype] - 2, *case) for case in cases) > TOLERANCE[dtype]
    assert max(polynomial_error(dtype, DEGREE[dtype], step, 500) for step in COUNTS if step >= 30) < 1e-9


def plain(drift_rates: list[float], last: int, m: float, v: float, eps: float) -> float:
    """The sum of the module's docstring, term by term."""
    return sum(
        rate * 0.9 ** (s - last) * m / (1 - 0.9**s) / ((0.999 ** (s - last) * v / (1 - 0.999**s)) ** 0.5 + eps)
        for s, rate in enumerate(drift_rates, 1)
        if s > last
    )


@pytest.fixture(scope="module")
def rates() -> list[float]:
    """More steps than the table begins with, at a rate that changes with each."""
    return np.random.default_rng(0).uniform(0, 0.1, 2_500).tolist()


@pytest.fixture(scope="module")
def drift(rates: list[float]) -> Drift:
    found = Drift(1e-8, torch.float64, "cpu")
    found.resume(rates)
    return found


@pytest.mark.parametrize("last", [1, 2, 50, 999, 1_023, 1_024, 1_500, 2_048, 2_400, 2_498, 2_499, 2_500])
def test_a_move_is_the_sum_of_its_terms(drift: Drift, rates: list[float], last: int) -> None:
    m, v = torch.tensor([[1e-3, -1e-9, 1.0, 0.0]]).double(), torch.tensor([[1e-6, 1e-17, 1e-12, 0.0]]).double()
    moved = drift.moved(torch.zeros(1, 4).double(), m, v, torch.tensor([last], dtype=torch.int32))
    expected = [-plain(rates, last, *pair, 1e-8) for pair in zip(m[0].tolist(), v[0].tolist(), strict=True)]
    np.testing.assert_allclose(moved[0].numpy(), expected, rtol=1e-12, atol=0)


def test_rows_of_no_step_stay_and_a_momentum_dies_out_within_the_window(drift: Drift) -> None:
    weight = torch.ones(1, 2).double()
    zero = torch.zeros_like(weight)
    assert torch.equal(drift.moved(weight, zero, zero, torch.zeros(1, dtype=torch.int32)), weight)
    window = Drift(1e-8, torch.float32, "cpu").window
    assert BETA1**window <= 2.0**-30 < BETA1 ** (window - 2)


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


def dense_step(optimizer: DenseOptimizer, comm: DoublingComm) -> float:
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
        loss = dense_step(optimizer, comm)
        assert comm.calls == [("step.dense.model", True), ("step.dense.stores", False)]
        assert loss == 2 * 10
        assert all((p.grad == 4).all() for p in optimizer.parameters.values())
