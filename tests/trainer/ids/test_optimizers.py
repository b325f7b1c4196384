"""Optimisers of ID rows: each against its plain form on the whole table, step by step; Adam against torch's own."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.config import OptimConfig
from trainer.errors import ConfigError
from trainer.ids.optimizers import RowOptimizer, row_optimizer, state_of
from trainer.ids.shards import IdRows, row_bytes
from trainer.optim import rates_at

ROWS, WIDTH, STEPS = 30, 4, 450
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
        pause = 100 <= step < 350
        rows_Q = np.flatnonzero(draw.random(ROWS) < chance_N * (0.02 if pause else 1))
        size_Q = 10.0 ** draw.uniform(-11, 0, (len(rows_Q), 1))
        gradient_QV = draw.normal(size=(len(rows_Q), WIDTH)) * size_Q * (draw.random((len(rows_Q), WIDTH)) < 0.9)
        made.append((torch.from_numpy(rows_Q), torch.from_numpy(gradient_QV)))
    return made


def torch_adam(table: Table) -> Callable[[], None]:
    config = table.config
    adam = torch.optim.Adam([table.dense], lr=1.0, betas=(config.beta1, config.beta2), eps=config.eps)

    def step() -> None:
        adam.param_groups[0]["lr"] = rates_at(config, table.num_steps - 1).ids_lr
        adam.step()

    return step


class TestAdam:
    @pytest.mark.long
    @pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"beta1": 0.95, "beta2": 0.99},
            {"beta1": 0.0},
            {"beta1": 0.5, "beta2": 0.9},
            {"eps": 1e-3},
            {"lr_gamma": 1.0, "warmup_steps": 0},
        ],
    )
    def test_every_row_after_every_step_is_that_of_torch_on_the_whole_table(
        self, seed: int, settings: dict[str, float]
    ) -> None:
        """All settings on one drawing of steps in `make test`, on another one in `make test-slow`."""
        table = Table(ids="adam", **settings)
        dense_step = torch_adam(table)
        for rows_Q, gradient_QV in drawn_steps(seed):
            table.step(rows_Q, gradient_QV)
            dense_step()
            torch.testing.assert_close(table.now(), table.dense.detach(), rtol=0, atol=2e-13)

    @pytest.mark.long
    def test_float32_is_about_as_near_as_torch_in_float32(self) -> None:
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

    def test_reading_changes_nothing(self) -> None:
        read, unread = Table(ids="adam"), Table(ids="adam")
        for rows_Q, gradient_QV in drawn_steps(0, 50):
            read.now()
            for table in (read, unread):
                table.step(rows_Q, gradient_QV)
        assert all(torch.equal(part, unread.rows.parts[name]) for name, part in read.rows.parts.items())

    def test_goes_on_from_its_shared_state(self) -> None:
        through, second = Table(ids="adam"), Table(ids="adam")
        steps = drawn_steps(0, 400)
        for each in steps[:250]:
            through.step(*each)
        for name, part in through.rows.parts.items():
            second.rows.parts[name].copy_(part)
        second.optimizer.load_shared_state(through.optimizer.shared_state())
        second.num_steps = 250
        for each in steps[250:]:
            through.step(*each)
            second.step(*each)
            assert torch.equal(through.now(), second.now())

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"beta1": 0.9999}, r"optim\.beta1=0\.9999: .* at most 0\.998; lower it"),
            ({"beta1": 0.9, "beta2": 0.5}, r"optim\.beta1=0\.9 and optim\.beta2=0\.5: .* take betas nearer to"),
        ],
    )
    def test_betas_without_exact_moves_are_refused(self, settings: dict[str, float], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            row_optimizer(OptimConfig(ids="adam", **settings), torch.float64)


class TestPlainForms:
    """Optimisers that leave rows alone which a step does not touch, against loops over touched rows."""

    def compare(self, table: Table, move: Callable[[Table, Tensor, Tensor], None], atol: float = 1e-12) -> None:
        for rows_Q, gradient_QV in drawn_steps(0, 300):
            table.step(rows_Q, gradient_QV)
            with torch.no_grad():
                move(table, rows_Q, gradient_QV)
            torch.testing.assert_close(table.now(), table.dense.detach(), rtol=0, atol=atol)

    def test_rowwise_adagrad_has_one_sum_a_row(self) -> None:
        table, sums = Table(ids="rowwise_adagrad"), torch.zeros(ROWS, dtype=torch.float64)

        def move(table: Table, rows_Q: Tensor, gradient_QV: Tensor) -> None:
            lr = rates_at(table.config, table.num_steps - 1).ids_lr
            for row, gradient_V in zip(rows_Q.tolist(), gradient_QV, strict=True):
                sums[row] += (gradient_V**2).mean()
                table.dense[row] -= lr * gradient_V / (sums[row].sqrt() + table.config.eps)

        self.compare(table, move)


@pytest.mark.parametrize(
    ("ids", "numbers", "counts"),
    [
        ("adam", 3 * 12, 1),
        ("rowwise_adagrad", 13, 0),
    ],
)
def test_each_keeps_what_it_needs(ids: Any, numbers: int, counts: int) -> None:
    config = OptimConfig(ids=ids)
    assert row_bytes(12, state_of(config), torch.float32) == 4 * (numbers + counts)
    assert row_optimizer(config, torch.float32).state == state_of(config)


def test_what_only_reads_has_no_state_and_moves_nothing() -> None:
    reader = RowOptimizer(OptimConfig(), torch.float32, "cpu")
    assert reader.state == () and reader.shared_state() == {}
