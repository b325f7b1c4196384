"""Timed training steps of one process, and what each of them carries to the device."""

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.problems import Problem
from benchmarks.report import Figure, Section
from benchmarks.workload import Workload
from featurestore.errors import UserError
from featurestore.store import FeatureStore
from featurestore.upkeep.remake import remake
from trainer.comm import SoloComm
from trainer.config import load_config
from trainer.engine.engine import PreparedBatch
from trainer.engine.machine import device_name
from trainer.engine.wiring import ContentRequest
from trainer.ids.tables import RowRequest
from trainer.runs.open import Run, open_run
from trainer.samples.reader import Batch
from trainer.stages import ReadAhead, prepare_ahead

_WARM_UP, _PROFILED = 3, 3
_PLACE_BYTES = 8


def check_device(device: str) -> None:
    """Raise UserError where there is no GPU to measure."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(Problem.NO_GPU)


def measure(workload: Workload, dims: int, device: str, steps: int, progress: Progress) -> Section:
    """Train with the workload's features, and with compact ones of `dims` numbers.

    The device holds the compact ones, or they come from the host in each step.
    """
    compact = workload.folder / f"features-{dims}"
    remake(FeatureStore.open(workload.store), compact, dims=dims)
    grid: dict[str, dict[str, Figure]] = {}
    name = ""
    kinds = {
        "full": (workload.store, "auto"),
        "compact": (compact, "true"),
        "compact_from_host": (compact, "false"),
    }
    for kind, (store, held) in kinds.items():
        settings = [*workload.settings(1), f"data.store={store}", f"run.device={device}", f"run.name={kind}"]
        settings.append(f"run.features_on_device={held}")
        task = progress.add_task(f"train: {kind}", total=_WARM_UP + steps + _PROFILED)
        run = open_run(load_config(workload.config, settings), SoloComm())
        with closing(run):
            name = device_name(run.device)
            grid[kind] = {
                **_figures(run, steps, partial(progress.advance, task)),
                "host_limit_samples_per_s": _host_limit(run, steps),
            }
    return Section("one process", {"device": name}, grid)


def _figures(run: Run, steps: int, advance: partial[None]) -> dict[str, Figure]:
    """Figures of steps that were timed, without a profiler; the device's own time is of profiled ones behind them."""
    count, on_gpu = _WARM_UP + steps + _PROFILED, run.device.type == "cuda"
    carried: list[dict[str, int]] = []
    started_s = cpu_s = elapsed_s = device_s = 0.0
    samples, loss = 0, 0.0
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    profiler = profile(activities=activities)
    with closing(ReadAhead(_batches(run))) as ahead:
        prepare = partial(next, run.engine.prepared(ahead))
        with closing(prepare_ahead(count, prepare)) as coming:
            for number, result in enumerate(coming):
                if number == _WARM_UP:
                    started_s, cpu_s = time.perf_counter(), time.process_time()
                if number == _WARM_UP + steps:
                    _finish(run.device)
                    elapsed_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
                    profiler.start()
                prepared = result()
                if _WARM_UP <= number < _WARM_UP + steps:
                    carried.append(bytes_to_device(run, prepared))
                    samples += prepared.batch.num_samples
                loss = run.engine.train_step(prepared).loss
                advance()
    _finish(run.device)
    profiler.stop()
    if on_gpu:
        device_s = sum(each.self_device_time_total for each in profiler.key_averages()) / 1e6
    share = device_s / _PROFILED / (elapsed_s / steps) if on_gpu else cpu_s / elapsed_s / len(os.sched_getaffinity(0))
    means = {f"{part}_bytes": sum(each[part] for each in carried) / steps for part in carried[0]}
    total = sum(means.values())
    return {
        "samples_per_s": samples / elapsed_s,
        "step_ms": 1e3 * elapsed_s / steps,
        "busy_share": share,
        **means,
        "bytes_per_step": total,
        "features_on_device": all(service.holds_rows for service in run.engine.services.values()),
        "last_loss": loss,
    }


def _host_limit(run: Run, steps: int) -> float:
    """Measure samples per second that the host can feed: what reading and preparation do with no step beside them."""
    samples, started_s = 0, 0.0
    with closing(ReadAhead(_batches(run))) as ahead:
        for number, prepared in enumerate(itertools.islice(run.engine.prepared(ahead), _WARM_UP + steps)):
            if number == _WARM_UP:
                samples, started_s = 0, time.perf_counter()
            samples += prepared.batch.num_samples
            run.engine._exchange.release(prepared.request)
    return samples / (time.perf_counter() - started_s)


def bytes_to_device(run: Run, prepared: PreparedBatch) -> dict[str, int]:
    """Count the bytes that a step needs on the device and that the host has.

    They are rows of features as they are stored, or their places where the device holds all rows; places of keys and ID
    rows; the batch itself. On a CPU nothing is carried: there it is what a GPU would get.
    """
    request, batch = prepared.request, prepared.batch
    served = request.served_S
    (service,) = run.engine.services.values()
    num_images = sum(each.num_unique for each in served if isinstance(each, ContentRequest))
    features = num_images * (_PLACE_BYTES if service.holds_rows else service.partition.info.row_bytes)
    places: list[Tensor] = [each for places_of_field in request.fields.values() for each in places_of_field]
    places += [rows for plan in request.plans for rows in (plan.reply_rows, plan.status_rows_P)]
    places += [each.rows_Q for each in served if isinstance(each, RowRequest)]
    arrays: list[NDArray[Any]] = [
        batch.label_B,
        batch.group_of_sample_B,
        *batch.dense.values(),
        *batch.weights.values(),
    ]
    return {
        "features": features,
        "places": sum(each.nbytes for each in places),
        "batch": sum(each.nbytes for each in arrays),
    }


def _batches(run: Run) -> Iterator[Batch]:
    """Yield this rank's batches, epoch after epoch without end."""
    return itertools.chain.from_iterable(run.train_reader.batches(epoch) for epoch in itertools.count())


def _finish(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
