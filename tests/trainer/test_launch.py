"""Commands on ranks: a rank's place in a Slurm job, how one ends where work fails, and pages that rank 0 writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from typer import Exit

from featurestore.console.output import print_line, text_console
from featurestore.console.page import ReportPage, recorded
from tests.pages import ReadPage
from trainer.cli import run_on_ranks
from trainer.comm import Comm, SoloComm
from trainer.comm.distributed import interface_towards
from trainer.errors import ConfigError, DataError
from trainer.launch import By, slots_of_job, variables_in_job

RANKS = [2, 3, 1]
"""Of three nodes."""


def slurm_of(rank: int) -> dict[str, str]:
    """What Slurm says to the rank of that number."""
    node = next(number for number in range(3) if rank < sum(RANKS[: number + 1]))
    names = {"SLURM_PROCID": rank, "SLURM_NODEID": node, "SLURM_LOCALID": rank - sum(RANKS[:node]), "SLURM_JOB_ID": 7}
    job = {"SLURM_TASKS_PER_NODE": "2,3,1", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
    return {**{name: str(value) for name, value in names.items()}, **job}


@pytest.mark.parametrize(("text", "expected"), [("1", [1]), ("2(x3)", [2, 2, 2]), ("16(x2),3,1", [16, 16, 3, 1])])
def test_the_short_form_is_taken_apart(text: str, expected: list[int]) -> None:
    assert [*slots_of_job({"SLURM_JOB_ID": "7", "SLURM_TASKS_PER_NODE": text}).values()] == expected


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "this is not a Slurm job: .* sbatch"),
        ({"SLURM_TASKS_PER_NODE": "1"}, "this is not a Slurm job"),
        ({"SLURM_JOB_ID": "7"}, "add --ntasks-per-node=N"),
        ({"SLURM_JOB_ID": "7", "SLURM_TASKS_PER_NODE": "2(x3"}, "add --ntasks-per-node=N"),
    ],
)
def test_what_is_missing_is_said(variables: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        slots_of_job(variables)


def test_horovod_has_the_places_that_horovodrun_gives() -> None:
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.gloo_run import create_run_env_vars, create_slot_env_vars

    plan = get_host_assignments(parse_hosts("0:2,1:3,2:1"), 6)
    for slot in plan:
        expected = {**create_slot_env_vars(slot), **create_run_env_vars("127.0.0.1", ["lo"], "4000")}
        for interface in ("HOROVOD_GLOO_IFACE", "NCCL_SOCKET_IFNAME"):  # the rank names it
            del expected[interface]
        assert variables_in_job(By.HOROVOD, slurm_of(slot.rank), 4000) == expected


@pytest.mark.parametrize(("rank", "local", "node"), [(0, 0, 0), (1, 1, 0), (4, 2, 1), (5, 0, 2)])
def test_torch_has_the_places_that_torchrun_gives(rank: int, local: int, node: int) -> None:
    assert variables_in_job(By.TORCH, slurm_of(rank), 4000) == {
        "RANK": str(rank), "WORLD_SIZE": "6", "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(RANKS[node]),
        "GROUP_RANK": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4000",
    }  # fmt: skip
    assert interface_towards("127.0.0.1") == "lo"


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


def test_a_wrong_place_ends_the_command_before_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank on another machine does not look for the folder."""
    page, done = ReportPage(tmp_path / "missing" / "page.html", "T", []), list[int]()
    monkeypatch.setattr("trainer.comm.connect", lambda *_: OneOfTwo(1))
    with recorded(page):
        assert run_on_ranks(lambda comm: done.append(comm.rank)) == 0
    monkeypatch.setattr("trainer.comm.connect", lambda *_: OneOfTwo(0))
    with pytest.raises(Exit), recorded(page):
        raise Exit(run_on_ranks(lambda comm: done.append(comm.rank)))
    assert done == [1] and capsys.readouterr().err.startswith("error: cannot write --html")


def test_the_report_of_torchrun_ends_with_the_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, file = "train/a.parquet, row group 0 is damaged; write the file again", str(tmp_path / "error.json")

    def fails(_: Comm) -> None:
        raise DataError(text)

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", file)
    assert run_on_ranks(fails) == 1
    assert capsys.readouterr().err == f"error: {text}\n"
    failure = ProcessFailure(local_rank=0, pid=7, exitcode=1, error_file=file)
    *_, last, end = str(ChildFailedError("crossmedia", {0: failure})).splitlines()
    assert last.endswith(f"traceback : error: {text}")
    assert set(end) == {"="}
