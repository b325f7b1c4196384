"""The tables of every command, in a pipe and on narrow terminals: all numbers are there, each on one line."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.report import Section, write_sections
from crossmedia import demo
from featurestore.console.output import print_rows, text_console
from trainer import daily as daytable
from trainer.config import load_config, save_config
from trainer.evaluation import report
from trainer.evaluation.bootstrap import METRICS, Estimate, Evaluation, Measured, SlicedBy
from trainer.loop import summary

LONG = "a/very/long/folder/[bold]of[/x]/runs/" + "x" * 90
Shown = Callable[[Path], list[str]]


def of_store(_: Path) -> list[str]:
    print_rows(["version", "writer", "bytes"], [["1", "me", "123,456,789.0 kB"]], numbers=["version", "bytes"])
    return ["123,456,789.0 kB"]


def of_training(_: Path) -> list[str]:
    figures = {"samples_per_s": 1234567.8, "name": "n", "folder": LONG, "num_ranks": 2, "global_step": 2040}
    summary.show(text_console(), {**figures, "metrics": {"gauc": 0.654321}})
    return ["1,234,568", "0.6543", LONG]


def of_evaluation(folder: Path) -> list[str]:
    metrics = {name: Estimate(0.5 + at / 1000, 0.4, 0.6) for at, name in enumerate(METRICS)}
    whole = Measured(1234567, 89, 10, metrics)
    figures = Evaluation(whole, {"age": SlicedBy("age of the ad", {"new": whole})}, [])
    report.show(text_console(), {"run": LONG, "checkpoint": "step-7", "notes": []}, figures, folder)
    return [*(f"{0.5 + at / 1000:.4f}" for at in range(len(METRICS))), "0.4000 to 0.6000", "1,234,567", LONG]


def of_days(folder: Path) -> list[str]:
    day = folder / "2026-01-01"
    day.mkdir()
    save_config(
        load_config(settings=["data.train_days=[2026-01-01]", "data.test_days=[2026-01-02]"]), day / "config.yaml"
    )
    metrics = {name: 0.5 + at / 1000 for at, name in enumerate(("logloss", "auc", "gauc", "new_ad_auc", "new_ad_gauc"))}
    told = {"global_step": 1234567, "store_version": 19, "metrics": {"impressions": 7654321, **metrics}}
    (day / "report.json").write_text(json.dumps(told))
    daytable.show(folder, daytable.write(folder))
    return ["1,234,567", "7,654,321", "2026-01-01", "2026-01-02", *(f"{value:.4f}" for value in metrics.values())]


def of_benchmarks(_: Path) -> list[str]:
    write_sections([Section("t", {"samples_per_s_" + "of_all_" * 9: 1234567.0, "ratio": 0.12345})])
    return ["1,234,567", "0.1235"]


def of_the_demo(_: Path) -> list[str]:
    metrics = dict.fromkeys(demo.METRICS, 0.61234)
    variants = dict.fromkeys(demo.VARIANTS, metrics)
    demo.show({**variants, "unique_ratio": 0.12345, "bytes_sent_per_step": 1234567.0, "samples_per_s": 7654321.0})
    return ["0.6123 (+0.0000)", "7,654,321 samples/s"]


COMMANDS = [
    of_store, of_training, of_evaluation, of_days, of_benchmarks, of_the_demo,
]  # fmt: skip


def test_a_training_ends_with_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = of_training(Path())
    lines = capsys.readouterr().out.splitlines()
    assert [each for each in wanted if not any(each in line for line in lines)] == []
    assert len(lines) <= 15


@pytest.mark.parametrize("columns", [None, 120, 40])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_is_whole(
    command: Shown,
    columns: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    for name in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
    wanted = command(tmp_path)
    out = capsys.readouterr().out
    if columns is None:
        assert "\x1b" not in out
    lines = re.sub(r"\x1b\[[0-9;]*m", "", out).splitlines()
    assert [each for each in wanted if not any(each in line for line in lines)] == []
    assert not any("…" in line for line in lines)
