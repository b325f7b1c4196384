"""Keys reach their owners and vectors come back in place, for any number of ranks: alltoall played in one process."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.exchange.routing import (
    FAILED,
    OK,
    Bucketized,
    answer_slices,
    bucketize_by_owner,
    pack_key_blocks,
    reply_rows,
    unique,
    unique_below,
    unpack_key_blocks,
)

KEYS = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 5), max_size=12)


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
        keys_PS = [[data.draw(KEYS) for _ in range(num_sources)] for _ in range(num_ranks)]
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
