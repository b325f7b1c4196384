"""The load of a soak, and what it measures: answers, memory, files and threads of the server."""

import itertools
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx2
import numpy as np
import orjson
import psutil

from benchmarks.problems import Problem
from benchmarks.process import RunFailedError
from benchmarks.report import Figure, Section
from benchmarks.soak.servers import TARGETS, Target
from featurestore.errors import UserError
from trainer.launch import ended, free_port

_CLIENTS = 4
_SAMPLE_S = 10.0
_START_S = 180.0
_END_S = 600.0
"""The first and the last ten minutes, or a third of a shorter soak, are compared."""
_FAILURES = (OSError, httpx2.HTTPError, UserError)


@dataclass(frozen=True)
class Asked:
    """A request: its kind, when it was due, how long it took from then, and whether the answer was right."""

    kind: str
    due_s: float
    seconds: float
    is_right: bool


@dataclass
class Soak:
    """What was asked of a server, and what it took, with seconds since the beginning."""

    rate: float
    seconds: float
    log: Path
    asked: list[Asked] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)
    begin_s: float = field(default_factory=time.monotonic)

    def run(self, target: Target, pid: int) -> None:
        """Ask, change and measure until the time is over."""
        numbers = itertools.count()
        threads = [threading.Thread(target=self._ask, args=(target, numbers, seed)) for seed in range(_CLIENTS)]
        threads.append(threading.Thread(target=self._watch, args=(psutil.Process(pid),)))
        for thread in threads:
            thread.start()
        for number in range(1, int(self.seconds // 60) + 1):
            self._note(60 * number - 30, partial(_changed, target, number))
        for thread in threads:
            thread.join()

    def _ask(self, target: Target, numbers: "itertools.count[int]", seed: int) -> None:
        draw = random.Random(seed)
        while (due_s := next(numbers) / self.rate) < self.seconds:
            self._note(due_s, lambda: target.ask(draw))

    def _note(self, due_s: float, work: Callable[[], tuple[str, bool]]) -> None:
        """Do something at its time, and note how it went."""
        self._wait_until(due_s)
        try:
            kind, is_right = work()
        except _FAILURES as error:
            kind, is_right = f"{type(error).__name__}: {str(error)[:100]}", False
        self.asked.append(Asked(kind, due_s, self._now_s() - due_s, is_right))

    def _watch(self, process: psutil.Process) -> None:
        for number in range(int(self.seconds // _SAMPLE_S)):
            self._wait_until(number * _SAMPLE_S)
            family = [process, *process.children(recursive=True)]
            memory = [each.memory_full_info() for each in family]
            taken = {
                "rss_mb": sum(each.rss for each in memory) / 1e6,
                "private_mb": sum(each.uss for each in memory) / 1e6,
                "files": float(sum(each.num_fds() for each in family)),
                "threads": float(sum(each.num_threads() for each in family)),
            }
            self.samples.append({"at_s": self._now_s(), **taken})
            failed = [each.kind for each in self.asked if not each.is_right]
            self.log.write_text(f"{len(self.asked)} asked, {len(failed)} failed: {sorted(set(failed))}\n")
            (self.log.with_suffix(".json")).write_bytes(orjson.dumps(self.samples))

    def _now_s(self) -> float:
        return time.monotonic() - self.begin_s

    def _wait_until(self, moment_s: float) -> None:
        time.sleep(max(0.0, moment_s - self._now_s()))

    def sections(self, title: str, warm_s: float) -> list[Section]:
        """Compare the beginning with the end."""
        samples = [each for each in self.samples if each["at_s"] >= warm_s]
        figures: dict[str, Figure] = {}
        for name in ("rss_mb", "private_mb", "files", "threads"):
            values = [each[name] for each in samples]
            slope, half = growth([each["at_s"] for each in samples], values)
            figures |= {f"{name}_warm": values[0], f"{name}_end": values[-1]}
            figures |= {f"{name}_an_hour": slope, f"{name}_an_hour_plus_minus": half}
        kinds = ["all", *sorted({each.kind for each in self.asked})]
        return [Section(title, figures), Section("requests", grid={kind: self._of(kind) for kind in kinds})]

    def _of(self, kind: str) -> dict[str, Figure]:
        asked, part_s = [each for each in self.asked if kind in ("all", each.kind)], min(_END_S, self.seconds / 3)
        figures: dict[str, Figure] = {"count": len(asked), "failed": sum(not each.is_right for each in asked)}
        for end, begin_s in (("first", 0.0), ("last", self.seconds - part_s)):
            ms = [1e3 * each.seconds for each in asked if begin_s <= each.due_s < begin_s + part_s]
            figures |= {f"{end} p{p} ms": float(np.percentile(ms, p)) for p in (50, 99) if ms}
        return figures


def _changed(target: Target, number: int) -> tuple[str, bool]:
    target.change(number)
    return "change", True


def growth(at_s: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Fit a line to the means of minutes; return its slope an hour, and half its 95 % confidence interval.

    Minutes next to each other are alike: the interval is widened by the correlation of residuals with the next.
    """
    minute_N = np.asarray(at_s) // 60
    hour_M = np.unique(minute_N) / 60
    mean_M = np.array([np.asarray(values)[minute_N == minute].mean() for minute in np.unique(minute_N)])
    slope, level = np.polyfit(hour_M, mean_M, 1)
    rest_M = mean_M - slope * hour_M - level
    alike = min(0.9, max(0.0, float(rest_M[1:] @ rest_M[:-1]) / max(float(rest_M @ rest_M), 1e-12)))
    variance = float(rest_M @ rest_M) / (len(rest_M) - 2) * (1 + alike) / (1 - alike)
    return float(slope), 2 * float(np.sqrt(variance / ((hour_M - hour_M.mean()) ** 2).sum()))


def run_soak(of: str, demo: Path, folder: Path, rate: float, seconds: float) -> Soak:
    """Serve a copy of the demo, and put its server under load. Raises RunFailedError where it does not answer."""
    place, port = folder.absolute() / of, free_port()
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(demo, place / "demo")
    target = TARGETS[of](place / "demo", port)
    with (place / "log.txt").open("wb") as log:
        command = [sys.executable, "-m", *target.command, "--port", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    with ended(process):
        begin_s = time.monotonic()
        while not is_ready(target):
            if process.poll() is not None or time.monotonic() - begin_s > _START_S:
                raise RunFailedError(Problem.SERVER_SILENT, f"port {port}", place / "log.txt")
            time.sleep(1)
        soak = Soak(rate, seconds, place / "soak.txt")
        soak.run(target, process.pid)
    return soak


def is_ready(target: Target) -> bool:
    """Ask the server for some things; return whether all answers are right."""
    with suppress(*_FAILURES):
        return all(target.ask(random.Random(seed))[1] for seed in range(8))
    return False
