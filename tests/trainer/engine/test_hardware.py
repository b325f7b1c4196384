"""What a run says of its hardware: its first line and its report name the devices and what carries the collectives."""

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from featurestore.lookup.compute_dtype import VARIABLE, dtype_of_machine
from tests.ranks import StandingRanks
from trainer.comm import SoloComm
from trainer.loop.summary import hardware_of, hardware_text
from trainer.main import app

Places = Any


def report_of(places: Places, name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((places.folder / "runs" / name / "report.json").read_text())
    return report


def test_two_ranks_on_cpu_name_gloo(places: Places, two_ranks: StandingRanks) -> None:
    settings = places.settings(run__name="gloo", train__max_steps=1, run__device="cpu")
    first = two_ranks.run("-m", "trainer.main", "--set", *settings).splitlines()[0]
    assert ", 2 ranks on cpu, collectives: Gloo by Horovod, compute_dtype float32, step 0 of 1" in first
    report = report_of(places, "gloo")
    assert (report["devices"], report["collectives"]) == (["cpu", "cpu"], "Gloo by Horovod")


def test_one_process_has_no_collectives(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)  # the processor decides
    dtype = dtype_of_machine("cpu")
    settings = places.settings(run__name="solo", train__max_steps=1, run__device="cpu")
    result = CliRunner().invoke(app, ["--set", *settings])
    assert result.exit_code == 0, result.output
    assert f", one process on cpu, no collectives, compute_dtype {dtype}, step 0 of 1" in result.stdout.splitlines()[0]
    report = report_of(places, "solo")
    assert (report["devices"], report["collectives"], report["compute_dtype"]) == (["cpu"], None, dtype)
    assert f"compute_dtype: {dtype}\n" in (places.folder / "runs" / "solo" / "config.yaml").read_text()


def test_gpus_are_named_with_their_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    solo = hardware_of(SoloComm(), torch.device("cuda", 0), "bfloat16")
    assert hardware_text(solo, 1) == "one process on cuda:0 (NVIDIA H100), no collectives, compute_dtype bfloat16"
    several = solo | {
        "devices": [f"cuda:{rank} (NVIDIA H100)" for rank in (0, 1, 0, 1)],
        "collectives": "NCCL by Horovod",
    }
    assert (
        hardware_text(several, 4)
        == "4 ranks on cuda:0 (NVIDIA H100), cuda:1 (NVIDIA H100), collectives: NCCL by Horovod, compute_dtype bfloat16"
    )
