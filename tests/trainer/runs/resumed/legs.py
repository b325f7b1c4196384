"""Runs that note the samples and the loss of every step, started once or several times, and what they must agree in."""

import itertools
import json
import re
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.raised import told
from tests.ranks import Forks, command_of, environment
from tests.trainer.conftest import Places
from tests.trainer.standing_ranks import run as run_here
from trainer.problems import Problem
from trainer.schema.fields import DEFAULT_SCHEMA

WORKER = Path(__file__).parent / "mortal.py"
TIMEOUT_S = 150
# Rounding alone stays far below it; a lost step, sample or moment is 1e-4 and more.
TOLERANCE = 1e-9


def write_schema_with_serials(folder: Path) -> Path:
    """Write the usual schema, in which an impression's number is an id too: it tells which samples a step has."""
    schema = yaml.safe_load(DEFAULT_SCHEMA.read_text())
    schema["fields"].append({"name": "ad_serial", "side": "ad", "kind": "id", "table": "serial"})
    file = folder / "schema.yaml"
    file.write_text(yaml.safe_dump(schema))
    return file


def comparable_settings(
    places: Places, schema: Path, folder: object, steps: int, every: int, **changes: Any
) -> list[str]:
    """Settings of a run in `folder` with that schema, in which much depends on the step and on each row's own count."""
    settings = {
        "data__schema_file": schema,
        "data__global_batch_size": 30,
        "data__shuffle_streams": 3,
        "model__compute_dtype": "float64",
        "model__id_dropout": 0.2,
        "model__tables__serial": 64,
        "optim__lr_gamma": 0.8,
        "optim__lr_every": 30,
        "train__epochs": 10_000,
        "train__max_steps": steps,
        "train__checkpoint_every": every,
        "train__checkpoint_beside": False,  # tests know from which one a killed run goes on
        "run__dir": folder,
        "run__name": "run",
    }
    return list(places.settings(**{**settings, **changes}))


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

    def leg(self, number: int, ranks: int, die_at: int = 0, forks: Forks | None = None) -> Leg:
        """Goes on with so many ranks, of a launcher or forked, until the last of them gets SIGKILL in that step and one
        that is left says so (a launcher may end the others first), or to the end; one rank that is to come to the end
        is this process."""
        if ranks == 1 and not die_at:
            code, output = run_here(self.words(number))
            assert code == 0, output
            return self.seen(number, ranks)
        if forks is None:
            process = self.start(number, ranks, die_at)
            output, _ = process.communicate(timeout=TIMEOUT_S)
            codes: list[int | None] = [process.returncode]
        else:
            codes, output = forks.outcome(ranks, self.folder / f"log-{number}.txt", *self.words(number, die_at))
        assert 0 not in codes if die_at else set(codes) == {0}, output
        lost = re.search(f"error: {told(Problem.LOST_RANK)}", output) is not None
        assert lost == (die_at > 0 and ranks > 1), output
        return self.seen(number, ranks)

    def start(self, number: int, ranks: int, die_at: int = 0) -> "subprocess.Popen[str]":
        command = command_of(ranks, *self.words(number, die_at))
        return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def words(self, number: int, die_at: int = 0) -> list[str]:
        """What follows `python` on the command line of a leg."""
        resume = f"run.resume={'latest' if number else 'null'}"
        return [*map(str, (WORKER, self.notes(number), die_at)), *self.settings, resume]

    def notes(self, number: int) -> Path:
        return self.folder / f"notes-{number}"

    def seen(self, number: int, ranks: int) -> Leg:
        return read_leg(self.notes(number), ranks)


def read_leg(notes: Path, ranks: int) -> Leg:
    """What so many ranks have noted in a folder (mortal.py)."""
    samples, losses = defaultdict(list), defaultdict(set)
    for rank in range(ranks):
        for line in (notes / f"{rank}-of-{ranks:d}.jsonl").read_text().splitlines():
            entry = json.loads(line)
            if "loss" in entry:
                losses[entry["step"]].add(entry["loss"])
            else:
                samples[entry["step"]].append(list(zip(entry["samples"], entry["labels"], strict=True)))
    return Leg(min(samples, default=0), dict(samples), dict(losses), int(ranks))


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
