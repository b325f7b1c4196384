"""Commands on ranks: the page of a command is checked and written by rank 0 alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer import Exit

from featurestore.console.output import print_line, text_console
from featurestore.console.page import ReportPage, recorded
from tests.pages import ReadPage
from trainer.cli import run_on_ranks
from trainer.comm import SoloComm


class OneOfTwo(SoloComm):
    """What a rank of two says of itself; the other one is not there."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def on_rank_0(self, work: Callable[[], Any]) -> Any:
        return work() if self.rank == 0 else None


@pytest.mark.parametrize("rank", [0, 1])
def test_the_page_is_written_by_rank_0(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.comm.connect", lambda *_: OneOfTwo(rank))
    with recorded(ReportPage(tmp_path / "page.html", "T", [])):
        assert run_on_ranks(lambda comm: print_line(text_console(), f"rank {comm.rank}")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"][rank:]
    if rank == 0:
        assert "rank 0" in ReadPage.of(tmp_path / "page.html").texts


def test_a_rank_on_another_machine_does_not_look_for_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ReportPage(tmp_path / "missing" / "page.html", "T", [])
    done: list[int] = []
    monkeypatch.setattr("trainer.comm.connect", lambda *_: OneOfTwo(1))
    with recorded(page):
        assert run_on_ranks(lambda comm: done.append(comm.rank)) == 0
    assert done == [1]


def test_a_wrong_place_ends_the_command_before_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[int] = []
    monkeypatch.setattr("trainer.comm.connect", lambda *_: OneOfTwo(0))
    with pytest.raises(Exit), recorded(ReportPage(tmp_path / "missing" / "page.html", "T", [])):
        raise Exit(run_on_ranks(lambda comm: done.append(comm.rank)))
    assert done == [] and capsys.readouterr().err.startswith("error: cannot write --html")
