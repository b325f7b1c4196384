"""How a command on ranks ends where work fails."""

from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from trainer.cli import run_on_ranks
from trainer.comm import Comm
from trainer.errors import DataError

TEXT = "train/a.parquet, row group 0 is damaged; write the file again"


def test_the_report_of_torchrun_ends_with_the_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: Comm) -> None:
        raise DataError(TEXT)

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert run_on_ranks(fails) == 1
    assert capsys.readouterr().err == f"error: {TEXT}\n"
    failure = ProcessFailure(local_rank=0, pid=7, exitcode=1, error_file=str(tmp_path / "error.json"))
    *_, last, end = str(ChildFailedError("crossmedia", {0: failure})).splitlines()
    assert last.endswith(f"traceback : error: {TEXT}")
    assert set(end) == {"="}
