"""Reports of a run: progress, events and figures for trackers while it trains, and report.json at its end.

Events are not written by torch's SummaryWriter: its thread dies of a full disk, and every call after that raises. It
leaves half of a record too, behind which TensorBoard reads nothing.

MLflow and Weights & Biases are off unless `run.tracking` names one, and their packages are extras. Rank 0 tells them
the settings, figures and addresses of a run; servers and projects are named by the variables that they read themselves
(MLFLOW_TRACKING_URI, WANDB_MODE, ...). A server far away may take minutes to answer or to fail, so a tracker works in a
thread of its own: the training never waits for it, and an error in it is one warning.
"""

import contextlib
import io
import itertools
import os
import queue
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from threading import Thread
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
from rich.table import Table
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from featurestore.console.output import figure, print_table, print_warning, progress_bars, text_column, text_console
from featurestore.errors import StorageError
from featurestore.parsing import parse_json
from featurestore.published.paths import RemotePath, RunPath, read_file, write_json_file
from featurestore.spec import flat
from featurestore.storage.storage import Storage
from featurestore.text import count_text, one_line
from trainer.comm import Comm
from trainer.config import Tracking
from trainer.engine import engine, machine, wiring
from trainer.errors import TrainerError
from trainer.evaluation.bootstrap import shown
from trainer.exchange.exchange import KeyRequest
from trainer.problems import Problem
from trainer.runs.open import Run, resumed_folder
from trainer.stages import AHEAD, WAIT, Stages

Values = Mapping[str, float]
PROJECT = "crossmedia"
"""The experiment, or project, where the environment names none."""
FILE = "tracking.json"
"""File in a run's folder with its id in each tracker, by which a run that is continued is found again."""
_END_S = 60.0
"""Longest wait, at the end of a run, for figures that a tracker has not taken yet."""
_LONGEST, _LONGEST_WHY = 500, 200
_LINE_EVERY_S = 5.0
_numbers = itertools.count()
Phase = Literal["wait", "compute", "evaluate", "checkpoint"]


class MlflowRun:
    """A run in MLflow, of the experiment MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, name: str, params: Mapping[str, str], earlier: str | None) -> None:
        import mlflow

        if earlier is None:
            mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        self._mlflow, run = mlflow, mlflow.start_run(run_id=earlier, run_name=None if earlier else name)
        self.id: str = run.info.run_id
        plain = {_plain(each): value[:_LONGEST] for each, value in params.items()}
        mlflow.log_params({each: value for each, value in plain.items() if each not in run.data.params})  # never change

    def add(self, step: int, values: Values, time_s: float) -> None:
        """Log the values as metrics."""
        plain = {_plain(name): value for name, value in values.items()}
        self._mlflow.log_metrics(plain, step=step, timestamp=round(time_s * 1000))

    def end(self, failed: bool) -> None:
        """Set the run's status."""
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


class WandbRun:
    """A run in Weights & Biases, of the project WANDB_PROJECT."""

    def __init__(self, name: str, params: Mapping[str, str], earlier: str | None) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        settings = wandb.Settings(silent=True, console="off")
        kept: dict[str, Any] = {"id": earlier, "resume": "allow"} if earlier else {}
        self._run: Any = wandb.init(project=project, name=name, config=dict(params), settings=settings, **kept)
        self.id: str = self._run.id

    def add(self, step: int, values: Values, time_s: float) -> None:
        """Log the values, with the time of the step, as steps that are trained again come late."""
        self._run.log({**values, "time_s": time_s}, step=step)

    def end(self, failed: bool) -> None:
        """Send all that is left."""
        self._run.finish(exit_code=int(failed))


Tracker = MlflowRun | WandbRun
_KINDS: Mapping[Tracking, type[Tracker]] = {"mlflow": MlflowRun, "wandb": WandbRun}


class TrackerThread:
    """A tracker in a thread of its own: calls return at once; the first failure ends it with one warning."""

    def __init__(self, kind: Tracking, begin: Callable[[], Tracker]) -> None:
        self._kind, self._begin = kind, begin
        self._calls: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._has_failed = False
        self._thread = Thread(target=self._work, name=f"tracking by {kind}", daemon=True)
        self._thread.start()

    def add(self, step: int, values: Values) -> None:
        """Note the values of a step."""
        if not self._has_failed:
            now_s = time.time()
            self._calls.put(lambda tracker: tracker.add(step, values, now_s))

    def end(self, failed: bool) -> None:
        """Say that the run has ended, and wait until the tracker has taken everything, at most _END_S."""
        self._calls.put(lambda tracker: tracker.end(failed))
        self._calls.put(None)
        self._thread.join(_END_S)
        if self._thread.is_alive():
            print_warning(f"{self._kind} has not taken all figures within {_END_S:.0f} s; the run ends without it")

    def _work(self) -> None:
        try:
            tracker = self._begin()
            while (call := self._calls.get()) is not None:
                call(tracker)
        except ImportError:
            self._fail(f"it is not installed: pip install 'crossmedia[{self._kind}]'")
        except Exception as failure:  # of any package that a tracker uses
            self._fail(one_line(failure)[:_LONGEST_WHY])

    def _fail(self, why: str) -> None:
        self._has_failed = True
        print_warning(f"run.tracking={self._kind}: {why}; the run continues without it")


def tracker_of(run: Run) -> TrackerThread | None:
    """Begin to track a run, or continue; None where `run.tracking` names no tracker. Only rank 0 calls it."""
    kind = run.config.run.tracking
    if kind is None:
        return None
    params, file, continues = params_of(run), run.folder / FILE, resumed_folder(run) == run.folder

    def begin() -> Tracker:
        ids: dict[str, str] = {}
        with contextlib.suppress(FileNotFoundError):
            ids |= parse_json(read_file(file)) if continues else {}
        tracker = _KINDS[kind](run.folder.name, params, ids.get(kind))
        write_json_file(file, {**ids, kind: tracker.id})
        return tracker

    return TrackerThread(kind, begin)


def params_of(run: Run) -> dict[str, str]:
    """List all settings of a run, and where its samples and stores are, with digest and snapshot.

    A tracker is looked at from anywhere: below `read` are whole addresses, also where those of the settings are short.
    """
    places = {"folder": Storage(str(run.folder)).url, "samples": Storage(run.config.data.samples).url}
    stores = {
        name: {**store.model_dump(mode="json"), "url": Storage(store.url).url} for name, store in run.stores.items()
    }
    read = {**places, "samples_digest": run.origin.data["samples_digest"], "stores": stores}
    return {name: str(value) for name, value in flat({**run.config.model_dump(mode="json"), "read": read})}


def _plain(name: str) -> str:
    """Replace characters that MLflow refuses in a name."""
    return re.sub(r"[^\w\-. /]", "_", name)


class ProgressLog:
    """Rank 0's log of a run of `total` steps; `folder` is for TensorBoard's file. Without it it does nothing.

    `tracker`: gets the same figures.
    """

    def __init__(
        self, folder: RunPath | None, first_step: int, total: int, tracker: "TrackerThread | None" = None
    ) -> None:
        self.console = text_console(quiet=folder is None)
        self._total = total
        self._events, self._tracker = EventsFile(folder, first_step) if folder else None, tracker
        self._warned: set[str] = set()
        self._next_line_s = 0.0
        self._bar = progress_bars(
            text_column(),
            BarColumn(),
            MofNCompleteColumn(),
            text_column("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=folder is None or not self.console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total, completed=first_step, text="")

    def __enter__(self) -> "ProgressLog":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.stop()
        if self._tracker:
            self._tracker.end(failed=kind is not None)

    def step(self, step: int, scalars: Mapping[str, float], details: Mapping[str, float]) -> None:
        """Show step number `step`; where there are `details`, these and `scalars` go to TensorBoard."""
        text = "  ".join(f"{name} {figure(value)}" for name, value in scalars.items())
        self._bar.update(self._task, completed=step, text=text)
        if details:
            self.details(step, {**{f"train/{name}": value for name, value in scalars.items()}, **details})
        if self._bar.disable and (step == self._total or time.monotonic() >= self._next_line_s):
            self._next_line_s = time.monotonic() + _LINE_EVERY_S
            self.say(f"step {step}/{self._total}  {text}")

    def metrics(self, step: int, metrics: Mapping[str, float | int | None], split: str = "test") -> None:
        """Show an evaluation at `step`, of test or validation samples.

        A metric that is not defined is printed as -, and not drawn.
        """
        names = ("logloss", "auc", "gauc", "new_ad_auc")
        text = "  ".join(f"{n} {'-' if (value := shown(metrics, n)) is None else format(value, '.4f')}" for n in names)
        self.say(f"step {step}  {split}: {text}")
        self.details(step, {f"{split}/{name}": value for name, value in metrics.items()})

    def details(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Write values for TensorBoard and the tracker alone; one that is not defined is not drawn."""
        drawn = {name: value for name, value in values.items() if value is not None}
        if self._tracker and drawn:
            self._tracker.add(step, drawn)
        if self._events and drawn:
            try:
                self._events.add(step, drawn)
            except OSError as failure:
                self._warn("events", f"figures for TensorBoard cannot be written: {failure}; the training continues")

    def flush(self) -> None:
        """Put TensorBoard's file to its address, if it is for one. Where that fails, it is reported."""
        if self._events:
            try:
                self._events.flush()
            except StorageError as failure:
                self._warn("flush", f"not all of TensorBoard's figures came to the run's folder: {failure}")

    def say(self, text: str) -> None:
        """Print one line; training continues where it cannot be written, as on a full disk."""
        try:
            self.console.print(text)
        except OSError as failure:
            self._warn("stdout", f"output cannot be printed: {failure}; the run continues")

    def _warn(self, what: str, text: str) -> None:
        """Print a warning on stderr, once for each thing that it is about."""
        if what not in self._warned:
            self._warned.add(what)
            with contextlib.suppress(OSError):
                print_warning(text)


class EventsFile:
    """One file of scalars in a folder, which is made with the first of them; by name it comes after earlier ones.

    TensorBoard hides what earlier files have of `first_step` and later ones. For an address the file is kept in memory,
    and put there by `flush`.
    """

    def __init__(self, folder: RunPath, first_step: int) -> None:
        now_s = time.time()
        of_process = f"{os.getpid()}.{next(_numbers):06}"  # a process may begin two within a second
        self._path = folder / f"events.out.tfevents.{now_s:010.0f}.{socket.gethostname()}.{of_process}"
        start = SessionLog(status=SessionLog.START)
        self._head = [
            Event(wall_time=now_s, file_version="brain.Event:2"),
            Event(wall_time=now_s, step=first_step, session_log=start),
        ]
        self._held = bytearray()
        self._size_bytes = 0  # of whole records that are there

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append the values of a step, all or none. Raises OSError."""
        now_s = time.time()
        events = [
            Event(wall_time=now_s, step=step, summary=scalar(name, value))  # type: ignore[no-untyped-call]
            for name, value in values.items()
        ]
        buffer = io.BytesIO()
        records = RecordWriter(buffer)
        for event in (*self._head, *events):
            records.write(event.SerializeToString())
        data = buffer.getvalue()
        if isinstance(self._path, RemotePath):
            self._held += data
        else:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.truncate(self._size_bytes)  # a full disk has left half a record
                file.write(data)
            self._size_bytes += len(data)
        self._head = []

    def flush(self) -> None:
        """Upload the events held in memory that are not at the address yet. Raises StorageError."""
        if isinstance(self._path, RemotePath) and len(self._held) > self._size_bytes:
            data = bytes(self._held)
            self._path.write_bytes(data)
            self._size_bytes = len(data)


@dataclass
class StepTotals:
    """Sums over the training steps of one rank since the run, or its resumption, began.

    `image_references`, `images`: the sums of `count_images`; over all ranks `images` is the number of unique images of
    the global batches. `warm_up_*`: the first step, which also pays for buffers and caches.
    """

    steps: int = 0
    samples: int = 0
    image_references: int = 0
    images: int = 0
    warm_up_samples: int = 0
    warm_up_s: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self, phase: Phase) -> Iterator[None]:
        """Add the block's wall time to the phase."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start_s

    def add(self, result: engine.StepResult, references: int, images: int) -> None:
        """Count one training step, with its images as `count_images` gives them."""
        self.steps += 1
        self.samples += result.num_samples
        self.image_references += references
        self.images += images
        if self.steps == 1:
            self.warm_up_samples, self.warm_up_s = self.samples, self.step_seconds

    @property
    def step_seconds(self) -> float:
        """Return the wall time of training alone, without evaluation and checkpoints."""
        return sum(self.seconds.get(phase, 0.0) for phase in ("wait", "compute"))

    @property
    def steady(self) -> tuple[int, float]:
        """Return samples and seconds of all steps but the first, unless it is the only one."""
        if self.steps <= 1:
            return self.samples, self.step_seconds
        return self.samples - self.warm_up_samples, self.step_seconds - self.warm_up_s


def count_images(request: KeyRequest) -> tuple[int, int]:
    """Count the images of one step on this rank, before the step.

    Returns keys in its batch, and unique keys that this rank owns, runs E on and answers.
    """
    pairs = zip(request.asked_S, request.served_S, strict=False)  # fewer are served where one went wrong
    content = [(asked, served) for asked, served in pairs if isinstance(served, wiring.ContentRequest)]
    return sum(len(asked.inverse_N) for asked, _ in content), sum(served.num_unique for _, served in content)


def step_details(stages: Stages) -> dict[str, float]:
    """Return the TensorBoard values of a logged step other than its loss: milliseconds of this rank's stages."""
    last_ms = stages.last_ms()
    hidden = {f"stage_hidden/{name}": row["hidden"] for name, row in stage_table([last_ms]).items()}
    details = {f"stage_ms/{name}": value for name, value in last_ms.items()}
    return details | {name: value for name, value in hidden.items() if value is not None}


def gather(comm: Comm, own: StepTotals, stages: Stages) -> dict[str, Any]:
    """Gather the run's figures over all ranks, the same on each; called by every rank.

    Bytes are those that ranks sent to others in training steps (keys, vectors, gradients, dense gradients), summed over
    ranks. Times are the mean over ranks. `samples_per_s` is that of the slowest rank, without the first step unless it
    is the only one. A ratio without a denominator is None.
    """
    traffic = {name: asdict(each) for name, each in comm.traffic.items() if name.startswith("step.")}
    mine = (asdict(own), traffic, stages.medians_ms())
    everyone = comm.allgather_object(mine, name="totals")
    ranks = [StepTotals(**values) for values, *_ in everyone]
    steps = own.steps
    sent = {name: sum(each[name]["sent"] for _, each, _ in everyone) for name in sorted(traffic)}
    steady_samples, slowest_s = sum(each.steady[0] for each in ranks), max(each.steady[1] for each in ranks)
    references, images = sum(each.image_references for each in ranks), sum(each.images for each in ranks)

    def per_step(total: float) -> float | None:
        return total / steps if steps else None

    return {
        "num_ranks": comm.size,
        "steps": steps,
        "samples": sum(each.samples for each in ranks),
        "samples_per_s": steady_samples / slowest_s if slowest_s else None,
        "unique_ratio": images / references if references else None,
        "images_per_step": per_step(images),
        "image_references_per_step": per_step(references),
        "bytes_sent_per_step": per_step(sum(sent.values())),
        "bytes_by_collective_per_step": {name: per_step(total) for name, total in sent.items()},
        "seconds": {
            phase: sum(each.seconds.get(phase, 0.0) for each in ranks) / len(ranks)
            for phase in Phase.__args__  # type: ignore[attr-defined]
        },
        "stages": stage_table([medians_ms for _, _, medians_ms in everyone]),
    }


def hardware_of(comm: Comm, device: torch.device, compute_dtype: str) -> dict[str, Any]:
    """Return the ranks' devices, number types and transport, the same on each rank; called by every rank.

    `devices`: of each rank, e.g. "cpu" or "cuda:0 (NVIDIA H100)". `collectives`: e.g. "Gloo by Horovod"; None in one
    process that no launcher started. `compute_dtype`: the resolved setting.
    """
    devices = comm.allgather_object(machine.device_name(device), name="devices")
    return {"devices": devices, "collectives": comm.carrier(device), "compute_dtype": compute_dtype}


def hardware_text(hardware: Mapping[str, Any], num_ranks: int) -> str:
    """Format `hardware_of`, e.g. '2 ranks on cpu, collectives: Gloo by Horovod, compute_dtype bfloat16'."""
    devices, dtype = ", ".join(dict.fromkeys(hardware["devices"])), f"compute_dtype {hardware['compute_dtype']}"
    if hardware["collectives"] is None:
        return f"one process on {devices}, no collectives, {dtype}"
    return f"{count_text(num_ranks, 'rank')} on {devices}, collectives: {hardware['collectives']}, {dtype}"


def stage_table(medians_R: list[dict[Any, float]]) -> dict[str, dict[str, float | None]]:
    """Return of each stage the milliseconds (mean over ranks of the medians), and its share of a step.

    `hidden`: of the stages that work ahead, the part of their time for which no step had to wait.
    """
    mean_ms = {name: sum(each[name] for each in medians_R) / len(medians_R) for name in medians_R[0]}
    ahead_ms = sum(mean_ms.get(name, 0.0) for name in AHEAD)
    wait_ms = mean_ms.get(WAIT, 0.0)
    step_ms = sum(value for name, value in mean_ms.items() if name not in AHEAD) if WAIT in mean_ms else None
    hidden = max(0.0, 1 - wait_ms / ahead_ms) if ahead_ms and WAIT in mean_ms else None
    return {
        name: {
            "median_ms": value,
            "share_of_step": value / step_ms if step_ms else None,
            "hidden": hidden if name in AHEAD else None,
        }
        for name, value in mean_ms.items()
    }


def write_report(path: RunPath, report: Mapping[str, Any]) -> None:
    """Write JSON, a whole file or none; undefined metrics are null. Raises TrainerError where the disk refuses."""
    try:
        write_json_file(path, report)
    except (OSError, StorageError) as failure:
        raise TrainerError(Problem.REPORT_UNWRITABLE, path, failure) from failure


def show(console: Console, report: Mapping[str, Any]) -> None:
    """Print a run's results, its speed and its place; all that was measured is in the report."""
    title = f"{report['name']}: {report['global_step']:,} steps, {count_text(report['num_ranks'], 'rank')}"
    metrics = report["metrics"]
    columns = {"": "all"} | ({"new_ad_": "of new ads"} if metrics.get("new_ad_impressions") else {})
    table = Table("test samples", title=title)
    for name in columns.values():
        table.add_column(name, justify="right")
    for name, title in {"impressions": "impressions", "logloss": "log loss", "auc": "AUC", "gauc": "GAUC"}.items():
        table.add_row(title, *(figure(shown(metrics, f"{which}{name}")) for which in columns))
    if metrics:
        print_table(console, table)
    console.print(f"{figure(report['samples_per_s'])} samples/s; all figures in {report['folder']}/report.json")
