"""What the supervisor does next: hosts, ranks, pauses, ends; and how it says what happened"""

import asyncio
from unittest import mock

import pytest

from trainer.hosts import HostSlots, News
from trainer.supervise import (
    Generation,
    Past,
    RankEnd,
    back_off_s,
    exit_code,
    fruitless,
    past_text,
    place,
    start_text,
)

A, B, C = HostSlots("a", 4), HostSlots("b", 4), HostSlots("c", 2)


def end(rank: int = 3, host: str = "b", code: int | None = -9, **more: object) -> RankEnd:
    return RankEnd(rank=rank, host=host, code=code, **more)  # type: ignore[arg-type]


def past(*ends: RankEnd, before: int = 0, after: int = 0, asked: bool = False) -> Past:
    return Past(step_before=before, step_after=after, ends=ends or (end(),), asked=asked)


@pytest.mark.parametrize(
    ("available", "least", "most", "placed"),
    [
        ([A, B], 2, 8, [("a", 4), ("b", 4)]),
        ([A, B], 2, 6, [("a", 4), ("b", 2)]),
        ([A, B], 2, 4, [("a", 4)]),
        ([B], 2, 8, [("b", 4)]),
        ([C], 2, 8, [("c", 2)]),
        ([C], 3, 8, None),
        ([], 1, 8, None),
    ],
)
def test_hosts_are_filled_in_their_order(
    available: list[HostSlots], least: int, most: int, placed: list[tuple[str, int]] | None
) -> None:
    found = place(available, least, most)
    assert (found and [(each.host, each.count) for each in found]) == placed


def test_pauses_grow_without_progress_alone() -> None:
    stuck = [past()] * 6
    assert [back_off_s(stuck[:count], 5) for count in range(7)] == [0, 5, 10, 20, 40, 60, 60]
    assert back_off_s([*stuck, past(before=10, after=20)], 5) == 0
    assert back_off_s([past(asked=True)], 5) == 0, "it was stopped to take more hosts in"


def test_restarts_without_a_newer_checkpoint_are_counted() -> None:
    assert fruitless([past()] * 4) == 4
    assert fruitless([*[past()] * 4, past(before=5, after=6)]) == 0
    assert fruitless([past(after=1), past(), past(asked=True), past()]) == 2


@pytest.mark.parametrize(
    ("codes", "asked_to_stop", "code"),
    [
        ([0, 0], False, 0),
        ([0, 0], True, 0),
        ([2, 2], False, 2),
        ([1, 2], False, 2),
        ([130, 130], True, 130),
        ([130, -15], True, 130),
        ([-9, 1], True, 130),
        ([130, 130], False, None),
        ([-9, 1], False, None),
        ([None, 1], False, None),
        ([0, -9], False, None),
    ],
)
def test_exit_codes(codes: list[int | None], asked_to_stop: bool, code: int | None) -> None:
    assert exit_code(past(*(end(code=each) for each in codes)), asked_to_stop) == code


def test_what_happened_is_said_in_one_line() -> None:
    assert past_text(past(end(), end(0, "a", 1, error="error: rank 0 lost another rank"))) == (
        "rank 3 on b died (signal 9, SIGKILL)"
    )
    assert past_text(past(end(0, "a", 1, error="error: the disk is full"))) == (
        "rank 0 on a ended with exit code 1 (error: the disk is full)"
    )
    assert past_text(past(end(code=None, error="No route to host"))) == "rank 3 on b is out of reach (No route to host)"
    hung = past(end(0, "a", 1, error="error: not there: rank 3"), end(was_killed=True))
    assert past_text(hung) == (
        "rank 3 on b did not end by itself and was killed; "
        "rank 0 on a ended with exit code 1 (error: not there: rank 3)"
    )
    aborted = past(end(0, "a", -6, error="what(): Timeout"), end(was_killed=True))
    assert past_text(aborted) == (
        "rank 3 on b did not end by itself and was killed; rank 0 on a died (signal 6, SIGABRT: what(): Timeout)"
    )
    crashed = past(end(0, "a", -11), end(was_killed=True))
    assert past_text(crashed) == "rank 0 on a died (signal 11, SIGSEGV)", "the other one waited for it"
    quiet = past(end(code=1), end(0, "a", 1, error="error: the disk is full"))
    assert past_text(quiet) == (
        "rank 3 on b ended with exit code 1; rank 0 on a ended with exit code 1 (error: the disk is full)"
    )
    assert past_text(past(end(code=130), asked=True)) == "stopped after a checkpoint, to continue with more hosts"
    assert start_text(1250, [A, C], 7, 8) == "7 of 8 slots left; resuming at step 1,250 on 6 ranks (a:4, c:2)"
    assert start_text(0, [HostSlots("a", 1)], 1, 1) == "1 of 1 slots left; starting at the first step on 1 rank (a:1)"


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([], None),
        (["warning: a", "", "Traceback", "  line 3"], "line 3"),
        (["error: the disk is full", "warning: b"], "error: the disk is full"),
        (["error: one", "  of it", "error: two"], "error: two"),
    ],
)
def test_the_last_error_of_a_rank_is_kept_for_its_end(lines: list[str], text: str | None) -> None:
    async def taken() -> list[RankEnd]:
        news: asyncio.Queue[News] = asyncio.Queue()
        generation = Generation([HostSlots("a", 1)], {"a": mock.Mock()}, news, mock.Mock())
        for line in lines:
            news.put_nowait(News("a", {"is": "line", "rank": 0, "stream": "err", "text": line}))
        news.put_nowait(News("a", {"is": "end", "rank": 0, "code": 1}))
        while not generation.is_over:
            await generation.next_news(10)
        return generation.ends

    assert [each.error for each in asyncio.run(taken())] == [text]
