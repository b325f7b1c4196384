"""What this machine can do: programs that measure it are started as the trainer would be, and their figures read."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config.config import Config, save_config
from trainer.engine.machine import check_threads
from trainer.errors import PlanError
from trainer.plan.cost import Machine, Network, Piece, Rates, Stage, step_seconds
from trainer.plan.rates import Measured

_TIMEOUT_S = 300
_MOST_PROCESSES = 8


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Calibration:
    """This machine with one rank on it, or with several; what was measured once is not measured again.

    As many processes as there are ranks, but no more than cores, measure at the same time; ranks beyond that share the
    cores by turns. A measurement takes about half a minute. Raises PlanError with what a program said that failed.
    """

    def __init__(self, config: Config, link_bytes_per_s: float, latency_s: float) -> None:
        self._config, self._link_bytes_per_s, self._latency_s = config, link_bytes_per_s, latency_s
        self._measured: dict[tuple[int, int, int], Measured] = {}

    def machine(self, local_ranks: int, large: int) -> Machine:
        """With `local_ranks` ranks, each with batches of about `large` samples."""
        cores = num_cores()
        check_threads(self._config.run.threads, cores)
        processes, threads = min(local_ranks, cores), self._config.run.threads or max(1, cores // local_ranks)
        case = processes, threads, large
        if case not in self._measured:
            self._measured[case] = self._rates(*case)
        measured = self._measured[case]
        wire = _run("trainer.plan.collectives", max(2, min(local_ranks, _MOST_PROCESSES)), [])
        network = Network(
            call_s=(wire["alltoall_call_s"] + wire["allreduce_call_s"]) / 2,
            latency_s=self._latency_s,
            link_bytes_per_s=self._link_bytes_per_s,
            local_bytes_per_s=2 / max(1e-12, wire["alltoall_byte_s"] + wire["allreduce_byte_s"]),
            ranks_per_machine=local_ranks,
        )
        rates = dataclasses.replace(measured.rates, jitter=0.0)
        alone = Machine(rates, dataclasses.replace(network, ranks_per_machine=processes), cores)
        return Machine(measured.rates, network, cores, interference(measured, alone, processes))

    def _rates(self, processes: int, threads: int, large: int) -> Measured:
        with tempfile.TemporaryDirectory(prefix="plan-") as folder:
            settings = Path(folder) / "config.yaml"
            save_config(self._config, settings)
            found = _run("trainer.plan.rates", processes, [str(settings), str(large), str(threads)])
        pieces = {name: Piece(**value) for name, value in found["rates"].items() if name != "jitter"}
        return Measured(Rates(**pieces, jitter=found["rates"]["jitter"]), found["loop_s"], found["loop_units"])


def interference(measured: Measured, machine: Machine, processes: int) -> float:
    """A step of the real loop over what its stages, timed one after the other, let expect on this machine."""
    stages: dict[str, Stage] = {}
    for name, units in measured.loop_units.items():
        piece: Piece = getattr(measured.rates, name)
        stages[name] = Stage(piece.seconds(units), piece.seconds(units) * piece.cores)
    # Its processes wait for nobody: the expected time is that of ranks without a wire, and without jitter among them.
    return measured.loop_s / step_seconds(stages, processes, machine)


def _run(module: str, processes: int, arguments: Sequence[str]) -> dict[str, Any]:
    """The JSON that `module` printed, run by itself or, for several processes, under horovodrun."""
    command = [sys.executable, "-m", module, *arguments]
    if processes > 1:
        command = [_horovodrun(), "-np", str(processes), *command]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as failure:
        raise PlanError(
            f"{module} did not end within {_TIMEOUT_S} s; give fewer samples per rank, or a machine less busy"
        ) from failure
    for line in done.stdout.splitlines():
        start = line.find("{")
        if done.returncode == 0 and start >= 0:
            values: dict[str, Any] = json.loads(line[start:])
            return values
    told = [line.partition("error: ")[2] for line in done.stderr.splitlines() if "error: " in line]
    said = told[0] if told else "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
    raise PlanError(f"measuring this machine failed ({module} on {processes} processes): {said}")


def _horovodrun() -> str:
    beside = Path(sys.executable).with_name("horovodrun")
    found = str(beside) if beside.exists() else shutil.which("horovodrun")
    if found is None:
        raise PlanError("horovodrun is not on the path: it is needed to measure collectives; see tools/install.sh")
    return found
