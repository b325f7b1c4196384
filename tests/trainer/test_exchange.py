"""Keys reach their owners, vectors come back and gradients return, for any number of ranks: against plain lookups."""

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from featurestore.keys import Int64Array
from tests.trainer.runs.saved import on_ranks
from trainer.comm import Comm
from trainer.exchange.exchange import Exchange
from trainer.exchange.routing import unique, unique_below
from trainer.exchange.vectors import FieldVectors
from trainer.samples.reader import Jagged

WIDTHS = {"items": 3, "shops": 3, "images": 2}
SOURCE_OF_FIELD = {"seen": "items", "ad": "items", "shop": "shops", "image": "images"}
KEYS = 40
"""Of each source."""


def alltoall(comm: Comm, rows_N: Tensor, splits_P: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """That of ranks which are threads: each shows all that it sends to all others."""
    sent = comm.allgather_object(rows_N.detach().split(splits_P.tolist()))
    pieces = [to[comm.rank] for to in sent]
    return torch.cat(pieces), torch.tensor([len(piece) for piece in pieces], dtype=torch.int32)


class WholeTable:
    """A source whose ranks all hold the same whole table; each gets the gradient of the keys that it owns."""

    def __init__(self, name: str, width: int, num_ranks: int) -> None:
        draw = torch.Generator().manual_seed(width)
        self.width, self._num_ranks, self.key_sources = width, num_ranks, {name: self}
        self.rows = torch.randn(KEYS, width, dtype=torch.float64, generator=draw).requires_grad_()

    def owner_of(self, keys_U: Int64Array) -> Int64Array:
        return keys_U % self._num_ranks

    def serve(self, keys_R: Int64Array, kind: str) -> Any:
        keys_Q, inverse_R = unique(keys_R)
        return SimpleNamespace(keys_Q=keys_Q, inverse_R=inverse_R, num_unique=len(keys_Q))

    def vectors(self, served: Sequence[Any]) -> list[Tensor]:
        return [self.rows[torch.from_numpy(each.keys_Q)] for each in served]

    def release(self, served: Any) -> None: ...


def fields_of(rank: int) -> dict[str, Jagged]:
    """Keys that ranks, fields and rows have in common, and a field without any on the last rank."""
    draw = np.random.default_rng(rank)
    counts = {"seen": 30, "ad": 10, "shop": 0 if rank == 2 else 12, "image": 25}
    return {name: Jagged(draw.integers(0, KEYS, n), np.ones(n, np.int32)) for name, n in counts.items()}


def loss_of(fields: dict[str, Jagged], values_of: Callable[[str], Tensor]) -> Tensor:
    """Sum all numbers, each with a factor of its own, so that no two gradients are equal."""
    total = torch.zeros((), dtype=torch.float64)
    for number, name in enumerate(fields):
        values_NV = values_of(name)
        factor_NV = torch.arange(1, 1 + values_NV.numel(), dtype=torch.float64).view_as(values_NV) + 1000 * number
        total = total + (factor_NV * values_NV).sum()
    return total


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_vectors_and_gradients_are_those_of_plain_lookups(num_ranks: int) -> None:
    tables = [{name: WholeTable(name, width, num_ranks) for name, width in WIDTHS.items()} for _ in range(num_ranks)]
    plain = {name: WholeTable(name, width, 1).rows for name, width in WIDTHS.items()}

    def step(comm: Comm) -> None:
        comm.alltoall = partial(alltoall, comm)  # type: ignore[method-assign]
        exchange = Exchange(comm, list(tables[comm.rank].values()), SOURCE_OF_FIELD, dtype=torch.float64)
        fields = fields_of(comm.rank)
        request = exchange.request(fields, "step")
        found: dict[str, FieldVectors] = exchange.vectors(request)
        for name, field in fields.items():
            expected_NV = plain[SOURCE_OF_FIELD[name]][field.values_N]
            assert torch.equal(found[name].vectors_UV[found[name].index_N], expected_NV)
        loss_of(fields, lambda name: found[name].vectors_UV[found[name].index_N]).backward()
        exchange.release(request)

    assert on_ranks(num_ranks, step) == [None] * num_ranks
    for rank in range(num_ranks):
        fields = fields_of(rank)
        loss_of(fields, lambda name, fields=fields: plain[SOURCE_OF_FIELD[name]][fields[name].values_N]).backward()
    for name, rows in plain.items():
        summed = sum(each[name].rows.grad for each in tables)
        torch.testing.assert_close(summed, rows.grad, rtol=0, atol=1e-9)
        for rank, each in enumerate(tables):
            not_own = np.arange(KEYS) % num_ranks != rank
            assert each[name].rows.grad[not_own].count_nonzero() == 0


def assert_as_numpy(found: tuple[Int64Array, Int64Array], asked_N: Int64Array) -> None:
    for mine, theirs in zip(found, np.unique(asked_N, return_inverse=True), strict=True):
        assert mine.dtype == np.int64 and mine.tolist() == theirs.tolist()


@pytest.mark.parametrize("num_keys", [0, 1, 100, 20_000])
@pytest.mark.parametrize("num_different", [1, 70, 1 << 62])
def test_as_numpy(num_keys: int, num_different: int) -> None:
    keys_N = np.random.default_rng(0).integers(-num_different, num_different, num_keys)
    for asked_N in (keys_N, np.unique(keys_N), np.sort(keys_N)):
        assert_as_numpy(unique(asked_N), asked_N)


@pytest.mark.parametrize("limit", [1, 128, 100_000, 1 << 40])
def test_below_a_limit_as_numpy(limit: int) -> None:
    numbers_N = np.random.default_rng(0).integers(0, limit, 5000)
    few = (np.array([0, 0]), np.array([limit - 1]), *(numbers_N[:count] for count in (0, 3)))
    for asked_N in (numbers_N, np.sort(numbers_N), *few):
        assert_as_numpy(unique_below(asked_N, limit), asked_N)
