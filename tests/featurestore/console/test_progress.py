"""How far a command is: lines now and then in a log, and a bar on a terminal that goes with the work."""

from types import SimpleNamespace

import pytest

from featurestore.console import output
from featurestore.console.output import progress_bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of the bar alone, in a list of one, which a test sets: loops of other threads live by the real one."""
    now = [100.0]
    monkeypatch.setattr(output, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar("reading", 2000) as bar:
        bar.advance(500)
        clock[0] += 10
        bar.advance(500)
        clock[0] += 1
        bar.advance(1000)
    assert capsys.readouterr().err == "reading: 1,000 of 2,000\nreading: 2,000 of 2,000\n"


def test_what_is_quick_says_nothing_in_a_log(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("shards") as bar:
        clock[0] += 9
        bar(8, 8)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_that_goes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("reading", 4, done=1) as bar:
        bar.advance(1)
        bar(4, 4)
    shown = capsys.readouterr().err
    assert "reading" in shown and "4/4" in shown and shown.endswith("\x1b[2K")


def test_what_goes_on_is_told_beside_the_numbers(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar("pages") as bar:
        bar(1, 9)
        for _ in range(3):
            clock[0] += 6
            bar.doing(f"map, {clock[0]:.0f} s")
    assert capsys.readouterr().err == "pages: map, 112 s\n"
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("pages") as bar:
        bar(1, 9)
        bar.doing("lays out a map")
    assert "lays out a map" in capsys.readouterr().err
