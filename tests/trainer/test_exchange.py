"""Keys reach their owners, vectors come back and gradients return, for any number of ranks: against plain lookups."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.comm.comm import SoloComm
from trainer.exchange.exchange import Exchange
from trainer.exchange.routing import (
    FAILED,
    OK,
    Bucketized,
    Int64,
    answer_slices,
    bucketize_by_owner,
    pack_key_blocks,
    reply_rows,
    unique,
    unique_below,
    unpack_key_blocks,
)
from trainer.exchange.vectors import FieldVectors
from trainer.samples.reader import Jagged

WIDTHS = {"items": 3, "shops": 3, "images": 2}
SOURCE_OF_FIELD = {"seen": "items", "ad": "items", "shop": "shops", "image": "images"}
KEYS = 40
"""Of each source."""


class ThreadComm(SoloComm):
    """One of several ranks that are threads: each leaves what it sends where the others find it."""

    def __init__(self, rank: int, boxes: list[list[Tensor]], barrier: threading.Barrier) -> None:
        super().__init__()
        self.rank, self.size, self._boxes, self._barrier = rank, len(boxes), boxes, barrier

    def alltoall(self, rows_N: Tensor, splits_P: Tensor, name: str) -> tuple[Tensor, Tensor]:
        self._boxes[self.rank] = list(rows_N.split(splits_P.tolist()))
        self._barrier.wait()
        pieces = [box[self.rank] for box in self._boxes]
        received = torch.cat(pieces), torch.tensor([len(piece) for piece in pieces], dtype=torch.int32)
        self._barrier.wait()
        return received


@dataclass
class Served:
    keys_Q: Int64
    inverse_R: Int64

    @property
    def num_unique(self) -> int:
        return len(self.keys_Q)


class WholeTable:
    """A source whose ranks all hold the same whole table; each gets the gradient of the keys that it owns."""

    def __init__(self, name: str, width: int, num_ranks: int) -> None:
        draw = torch.Generator().manual_seed(width)
        self.width, self._num_ranks, self.key_sources = width, num_ranks, {name: self}
        self.rows = torch.randn(KEYS, width, dtype=torch.float64, generator=draw).requires_grad_()

    def owner_of(self, keys_U: Int64) -> Int64:
        return keys_U % self._num_ranks

    def serve(self, keys_R: Int64, kind: str) -> Served:
        return Served(*unique(keys_R))

    def vectors(self, served: Sequence[Served]) -> list[Tensor]:
        return [self.rows[torch.from_numpy(each.keys_Q)] for each in served]

    def release(self, served: Served) -> None: ...


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
    boxes: list[list[Tensor]] = [[] for _ in range(num_ranks)]
    barrier = threading.Barrier(num_ranks, timeout=60)
    tables = [{name: WholeTable(name, width, num_ranks) for name, width in WIDTHS.items()} for _ in range(num_ranks)]
    plain = {name: WholeTable(name, width, 1).rows for name, width in WIDTHS.items()}

    def step(rank: int) -> None:
        comm = ThreadComm(rank, boxes, barrier)
        exchange = Exchange(comm, list(tables[rank].values()), SOURCE_OF_FIELD, dtype=torch.float64)
        request = exchange.request(fields_of(rank), "step")
        found: dict[str, FieldVectors] = exchange.vectors(request)
        for name, field in fields_of(rank).items():
            expected_NV = plain[SOURCE_OF_FIELD[name]][field.values_N]
            assert torch.equal(found[name].vectors_UV[found[name].index_N], expected_NV)
        loss_of(fields_of(rank), lambda name: found[name].vectors_UV[found[name].index_N]).backward()
        exchange.release(request)

    with ThreadPoolExecutor(num_ranks) as pool:
        list(pool.map(step, range(num_ranks)))
    for rank in range(num_ranks):
        fields = fields_of(rank)
        loss_of(fields, lambda name, fields=fields: plain[SOURCE_OF_FIELD[name]][fields[name].values_N]).backward()
    for name, rows in plain.items():
        summed = sum(each[name].rows.grad for each in tables)
        torch.testing.assert_close(summed, rows.grad, rtol=0, atol=1e-9)
        for rank, each in enumerate(tables):
            not_own = np.arange(KEYS) % num_ranks != rank
            assert each[name].rows.grad[not_own].count_nonzero() == 0


DRAWN_KEYS = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 5), max_size=12)


def alltoall(payload_P: list[np.ndarray], lengths_PP: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """What each rank receives when rank r sends payload_P[r], cut by lengths_PP[r]."""
    cut = [np.split(p, np.cumsum(lengths)[:-1]) for p, lengths in zip(payload_P, lengths_PP, strict=True)]
    received = []
    for rank in range(len(cut)):
        blocks = [pieces[rank] for pieces in cut]
        received.append((np.concatenate(blocks), np.array([len(block) for block in blocks])))
    return received


def asked_by(keys: list[int], num_ranks: int) -> Bucketized:
    keys_U, inverse_N = unique(np.array(keys, dtype=np.int64))
    return bucketize_by_owner(keys_U, inverse_N, keys_U % num_ranks, num_ranks)


class TestUnique:
    @pytest.mark.parametrize("num_keys", [0, 1, 100, 20_000])
    @pytest.mark.parametrize("num_different", [1, 70, 1 << 62])
    def test_as_numpy(self, num_keys: int, num_different: int) -> None:
        keys_N = np.random.default_rng(0).integers(-num_different, num_different, num_keys)
        for asked_N in (keys_N, np.unique(keys_N), np.sort(keys_N)):
            for mine, theirs in zip(unique(asked_N), np.unique(asked_N, return_inverse=True), strict=True):
                assert mine.dtype == np.int64 and mine.tolist() == theirs.tolist()

    @pytest.mark.parametrize("limit", [1, 128, 100_000, 1 << 40])
    def test_below_a_limit(self, limit: int) -> None:
        numbers_N = np.random.default_rng(0).integers(0, limit, 5000)
        sorted_N = np.sort(numbers_N)
        for asked_N in (numbers_N, sorted_N, numbers_N[:3], np.array([0, 0]), numbers_N[:0], np.array([limit - 1])):
            for mine, theirs in zip(unique_below(asked_N, limit), np.unique(asked_N, return_inverse=True), strict=True):
                assert mine.dtype == np.int64 and mine.tolist() == theirs.tolist()


class TestBucketize:
    def test_groups_by_owner_and_keeps_the_way_back(self) -> None:
        keys_N = np.array([7, 4, 7, 1, 2, 4])
        asked = asked_by(keys_N.tolist(), 3)
        assert asked.keys_U.tolist() == [1, 4, 7, 2]
        assert asked.send_counts_P.tolist() == [0, 3, 1]
        assert asked.keys_U[asked.inverse_N].tolist() == keys_N.tolist()

    @pytest.mark.parametrize("num_ranks", [1, 3])
    def test_no_keys(self, num_ranks: int) -> None:
        asked = asked_by([], num_ranks)
        assert len(asked.keys_U) == len(asked.inverse_N) == 0
        assert asked.send_counts_P.tolist() == [0] * num_ranks


class TestRoundTrip:
    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_every_key_gets_its_own_vector(self, data: st.DataObject) -> None:
        num_ranks, num_sources = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
        keys_PS = [[data.draw(DRAWN_KEYS) for _ in range(num_sources)] for _ in range(num_ranks)]
        asked_PS = [[asked_by(keys, num_ranks) for keys in keys_S] for keys_S in keys_PS]
        packed = [pack_key_blocks(OK, asked_S, num_ranks) for asked_S in asked_PS]
        arrived = alltoall([p for p, _ in packed], [lengths for _, lengths in packed])

        answers, lengths = [], []
        for rank, (payload, lengths_P) in enumerate(arrived):
            blocks = unpack_key_blocks(payload, lengths_P, num_sources)
            assert blocks.status_P.tolist() == [OK] * num_ranks
            uniques = [unique(keys_R) for keys_R in blocks.keys_SR]
            assert all((keys_Q % num_ranks == rank).all() for keys_Q, _ in uniques)
            rows = reply_rows(blocks.counts_PS, [inverse for _, inverse in uniques], [len(k) for k, _ in uniques])
            # The vector of key k of source s is (s, k); the status row is (-1, rank).
            table = [[-1, rank]] + [[s, key] for s, (keys_Q, _) in enumerate(uniques) for key in keys_Q.tolist()]
            answers.append(np.array(table, dtype=np.int64)[rows])
            lengths.append(blocks.counts_PS.sum(axis=1) + 1)

        for (received, _), asked_S, keys_S in zip(alltoall(answers, lengths), asked_PS, keys_PS, strict=True):
            status_rows_P, slices_SP = answer_slices(np.stack([a.send_counts_P for a in asked_S], axis=1))
            assert received[status_rows_P].tolist() == [[-1, rank] for rank in range(num_ranks)]
            for source, (asked, keys) in enumerate(zip(asked_S, keys_S, strict=True)):
                vectors = np.concatenate([received[rows] for rows in slices_SP[source]])
                assert vectors[asked.inverse_N].tolist() == [[source, key] for key in keys]

    def test_a_failed_rank_is_seen_by_all(self) -> None:
        packed = [pack_key_blocks(status, [asked_by([], 2)], 2) for status in (OK, FAILED)]
        for payload, lengths_P in alltoall([p for p, _ in packed], [lengths for _, lengths in packed]):
            assert unpack_key_blocks(payload, lengths_P, 1).status_P.tolist() == [OK, FAILED]
