"""The check of a GPU against the CPU, run on the CPU: what it prints, and that it can fail."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
SCRIPT = Path(__file__).with_name("on_device.py")
OTHERWISE = """
import sys; sys.path.insert(0, {folder!r})
import numpy, on_device, scenarios, torch, worker
from trainer.engine.engine import Engine
steps = Engine.train_step
def otherwise(self, prepared):
    otherwise.count += 1
    prepared.batch.label_B[0] = otherwise.count > otherwise.first and otherwise.count % 2
    return steps(self, prepared)
Engine.train_step = otherwise
for device, otherwise.first in (("cuda", 0), ("cpu", scenarios.STEPS), ("cpu", 2 * scenarios.STEPS)):
    otherwise.count = 0
    try:
        on_device.main(device, ["ids_only"])
    except SystemExit as error:
        print(error.code)
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


def test_no_gpu_and_other_losses_are_told() -> None:
    """The first run on the device has other labels than that on the CPU, then the second one alone."""
    done = run("-c", OTHERWISE.format(folder=str(SCRIPT.parent)), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    no_gpu, of_first, one, of_second, again = done.stdout.splitlines()
    assert no_gpu.startswith("error: no GPU found")
    assert "a loss differs from the CPU's" in of_first and "the losses of two runs" in of_second
    assert one == again == "error: 1 scenarios train otherwise on cpu"
