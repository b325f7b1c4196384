"""The check of a GPU against the CPU, run on the CPU: what it prints, and that it can fail."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("on_device.py")
BREAK = """
import sys; sys.path.insert(0, {folder!r})
import numpy, on_device, scenarios, torch, worker
from trainer.engine.engine import Engine
steps = Engine.train_step
def otherwise(self, prepared):
    otherwise.count += 1
    prepared.batch.label_B[0] = otherwise.count > {first} and otherwise.count % 2
    return steps(self, prepared)
otherwise.count = 0
Engine.train_step = otherwise
on_device.main("cpu", ["ids_only"])
"""


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[3])
    search = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search, **environment}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)


def test_the_cpu_trains_as_the_cpu() -> None:
    done = run(str(SCRIPT), "--device", "cpu", "--only", "both_attentive", "--only", "ids_only")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "both_attentive/float64: same",
        "both_attentive/float32: same",
        "ids_only/float64: same",
        "all trained on cpu as on the CPU",
    ]


@pytest.mark.parametrize(("after", "told"), [(12, "a loss differs from the CPU's"), (24, "the losses of two runs")])
def test_other_losses_are_told(after: int, told: str) -> None:
    done = run("-c", BREAK.format(folder=str(SCRIPT.parent), first=after))
    assert done.returncode == 1 and told in done.stdout
    assert done.stderr == "error: 1 scenarios train otherwise on cpu\n"


def test_no_gpu_is_one_line() -> None:
    done = run(str(SCRIPT), CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no GPU found") and done.stderr.count("\n") == 1
