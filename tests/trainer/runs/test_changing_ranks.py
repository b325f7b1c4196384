"""Runs that are killed and go on with other numbers of ranks: no step, sample or row is lost or taken twice

In float64, where rounding hides nothing, they end with the same parameters, optimisers, ID rows and predictions as an
undisturbed run. What other types make of sums in another order: python -m benchmarks.resume.
"""

import itertools
import json
import random
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.ranks import command_of, ranks_of
from trainer.config.config import PRESETS
from trainer.evaluation.predict import predict_run
from trainer.runs.checkpoint import read_state
from trainer.runs.folder import find_checkpoint

WORKER = Path(__file__).parent / "mortal.py"
TIMEOUT_S = 150
# Rounding alone stays far below it (docs/RESULTS.md); a lost step, sample or moment is 1e-4 and more.
TOLERANCE = 1e-9
Places = Any

pytestmark = pytest.mark.services


@dataclass(frozen=True)
class Leg:
    """One start of a run, to its end or to its death."""

    first_step: int
    samples: dict[int, list[list[tuple[int, float]]]]
    """Of each step the (serial, label) of its samples, in a list for each rank that came to it."""
    losses: dict[int, set[float]]
    num_ranks: int


@dataclass(frozen=True)
class Killed:
    """A run below `folder`, started over and over with other numbers of ranks."""

    folder: Path
    settings: list[str]

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def leg(self, number: int, ranks: int, die_at: int = 0) -> Leg:
        """Goes on with so many ranks, until the last of them gets SIGKILL in that step and the first says so, or to the
        end."""
        process = self.start(number, ranks, die_at)
        output, _ = process.communicate(timeout=TIMEOUT_S)
        assert (process.returncode != 0) == (die_at > 0), output
        assert ("error: rank 0 lost another rank" in output) == (die_at > 0 and ranks > 1), output
        return self.seen(number, ranks)

    def start(self, number: int, ranks: int, die_at: int = 0) -> "subprocess.Popen[str]":
        resume = [f"run.resume={'latest' if number else 'null'}"]
        command = command_of(ranks, WORKER, self.notes(number), die_at, *self.settings, *resume)
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def notes(self, number: int) -> Path:
        return self.folder / f"notes-{number}"

    def seen(self, number: int, ranks: int) -> Leg:
        samples, losses = defaultdict(list), defaultdict(set)
        for rank in range(ranks):
            for line in (self.notes(number) / f"{rank}-of-{ranks}.jsonl").read_text().splitlines():
                entry = json.loads(line)
                if "loss" in entry:
                    losses[entry["step"]].add(entry["loss"])
                else:
                    samples[entry["step"]].append(list(zip(entry["samples"], entry["labels"], strict=True)))
        return Leg(min(samples), dict(samples), dict(losses), ranks)


@pytest.fixture(scope="module")
def settings_of(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Settings in which much depends on the step and on each row's own count; no number of ranks divides a batch."""
    schema = yaml.safe_load((PRESETS / "schema.yaml").read_text())
    schema["fields"].append({"name": "ad_serial", "side": "ad", "kind": "id", "table": "serial"})
    file = tmp_path_factory.mktemp("schema") / "schema.yaml"
    file.write_text(yaml.safe_dump(schema))

    def settings(folder: Path, steps: int, every: int, **changes: Any) -> list[str]:
        return places.settings(
            data__schema_file=file,
            data__global_batch_size=30,
            model__compute_dtype="float64",
            model__id_dropout=0.2,
            model__tables__serial=64,
            optim__id_l2=0.01,
            optim__lr_gamma=0.8,
            optim__lr_every=30,
            train__epochs=10_000,
            train__max_steps=steps,
            train__checkpoint_every=every,
            run__dir=folder,
            run__name="run",
            **changes,
        )

    return settings


def parameters_and_moments(run: Path) -> dict[str, torch.Tensor]:
    path = find_checkpoint(run)
    return {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_no_step_or_sample_is_lost(legs: list[Leg], whole: Leg, steps: int) -> None:
    """Every leg takes the steps and samples of the undisturbed run, and goes on where its checkpoint ended."""
    expected = {step: sorted(itertools.chain(*parts)) for step, parts in whole.samples.items()}
    assert sorted(expected) == list(range(1, steps + 1))
    taken: list[int] = []
    for leg in legs:
        assert sorted(leg.samples) == list(range(leg.first_step, max(leg.samples) + 1)), "no step is left out"
        assert leg.first_step <= len(taken) + 1, "none is left out between two legs"
        taken = [*range(1, leg.first_step), *leg.losses]
        for step, parts in leg.samples.items():
            if step in leg.losses:
                assert len(parts) == leg.num_ranks
                assert sorted(itertools.chain(*parts)) == expected[step], f"step {step} of {leg.num_ranks} ranks"
                (loss,), (its_loss,) = leg.losses[step], whole.losses[step]
                assert loss == pytest.approx(its_loss, rel=TOLERANCE, abs=0)
    assert taken == list(range(1, steps + 1))


def assert_same_in_float64(found: Path, expected: Path) -> None:
    """All that is trained, and its predictions apart: rounding that the model cannot see is none that a user sees."""
    mine, theirs = parameters_and_moments(found), parameters_and_moments(expected)
    assert mine.keys() == theirs.keys()
    assert theirs["user/0000/weight"].dtype == torch.float64
    apart = {name: float((mine[name].double() - theirs[name].double()).abs().max()) for name in theirs}
    assert {name: value for name, value in apart.items() if value > TOLERANCE} == {}
    logits = [predict_run(run).logit_N for run in (found, expected)]
    np.testing.assert_allclose(*logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("optim", "first_ranks"),
    [
        pytest.param({"optim__ids": "rowwise_adam"}, 4, marks=pytest.mark.slow, id="plain"),
        pytest.param({"optim__ids": "adam", "optim__ids_restart": True}, 3, id="adam"),
    ],
)
def test_killed_with_other_ranks_each_time(
    settings_of: Callable[..., list[str]], tmp_path: Path, optim: dict[str, Any], first_ranks: int
) -> None:
    steps = 80
    undisturbed = Killed(tmp_path / "undisturbed", settings_of(tmp_path / "undisturbed", steps, 1000, **optim))
    whole = undisturbed.leg(0, ranks=1)
    killed = Killed(tmp_path / "killed", settings_of(tmp_path / "killed", steps, 10, **optim))
    deaths = [(first_ranks, 55), (1, 68), (2, 0)]  # 55 is in the third epoch
    legs = [killed.leg(number, ranks, die_at) for number, (ranks, die_at) in enumerate(deaths)]
    assert [leg.first_step for leg in legs] == [1, 51, 61]
    assert_no_step_or_sample_is_lost(legs, whole, steps)
    assert_same_in_float64(killed.run, undisturbed.run)
    assert read_state(find_checkpoint(killed.run)).num_ranks == 2


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_thousand_steps_and_ten_kills_at_any_moment(settings_of: Callable[..., list[str]], tmp_path: Path) -> None:
    """A rank or the launcher gets SIGKILL from outside, whatever it does just then."""
    steps, draw = 2_040, random.Random(0)
    undisturbed = Killed(tmp_path / "undisturbed", settings_of(tmp_path / "undisturbed", steps, 10_000))
    whole = undisturbed.leg(0, ranks=1)
    killed = Killed(tmp_path / "killed", settings_of(tmp_path / "killed", steps, 50))
    legs = []
    for number, ranks in zip(range(10), itertools.cycle([4, 1, 2]), strict=False):
        process = killed.start(number, ranks)
        wait_for_checkpoint(killed.run, (number + 1) * steps // 12, process)
        time.sleep(draw.uniform(0, 0.3))
        victims = [process.pid] if ranks == 1 else [process.pid, *(each.pid for each in ranks_of(process, str(WORKER)))]
        kill_and_wait(process, draw.choice(victims))
        legs.append(killed.seen(number, ranks))
    legs.append(killed.leg(10, ranks=2))
    assert_no_step_or_sample_is_lost(legs, whole, steps)
    assert_same_in_float64(killed.run, undisturbed.run)


def wait_for_checkpoint(run: Path, step: int, process: "subprocess.Popen[str]") -> None:
    """Until there is one of that step or a later one."""
    end = time.monotonic() + TIMEOUT_S
    while not any(int(path.name[5:]) >= step for path in (run / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def kill_and_wait(process: "subprocess.Popen[str]", victim: int) -> None:
    """Kills one process of a job and waits until all of them are gone."""
    job = psutil.Process(process.pid).children(recursive=True)
    psutil.Process(victim).kill()
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0
    _, alive = psutil.wait_procs(job, timeout=60)
    assert alive == []
