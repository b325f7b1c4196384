"""benchmarks.days at a tiny size: what a day costs over all days, and no figures where a file differs."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.days import app

TINY = ["--days", "4", "--sessions", "40", "--users", "60", "--rounds", "1"]

pytestmark = [pytest.mark.slow, pytest.mark.services]  # a Dask cluster, and two builds of days


def test_a_day_beside_all_days(tmp_path: Path) -> None:
    out = tmp_path / "days.json"
    result = CliRunner().invoke(app, [*TINY, "--dir", str(tmp_path / "days"), "--json", str(out)])
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert figures["day_share"] == pytest.approx(figures["day_s"] / figures["all_days_s"]) and figures["day_s"] > 0
    assert figures["day_cpu_share"] == pytest.approx(figures["day_cpu_s"] / figures["all_days_cpu_s"])
    assert figures["days_written"] in (1, 2)  # a session goes on over midnight, or none does
    for name in ("all", "added"):
        assert len(list((tmp_path / "days" / name / "test").iterdir())) == 1
        assert len(list((tmp_path / "days" / name / "train").iterdir())) == 3


def test_files_that_differ_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.samples import added

    add_days = added.add_days

    def spoiled(*arguments: Any) -> dict[str, Any]:
        made = add_days(*arguments)
        next((tmp_path / "days" / "added" / "test").iterdir()).write_bytes(b"")
        return made

    monkeypatch.setattr(added, "add_days", spoiled)
    result = CliRunner().invoke(app, [*TINY, "--dir", str(tmp_path / "days")])
    assert result.exit_code == 1 and "differs from the one that was added" in " ".join(result.output.split())
