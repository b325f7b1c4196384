"""How fast the stages of a step are on this machine: the real engine, alone, on batches of the real samples.

    [horovodrun -np L] python -m trainer.plan.rates CONFIG.yaml LARGE THREADS    prints JSON from rank 0

With L processes every one of them measures for itself, all at the same time: so busy is a machine with L ranks.
"""

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import pyarrow as pa
import torch

from featurestore.errors import FeatureStoreError
from featurestore.lookup.partition import FeaturePartition
from featurestore.store import FeatureStore
from trainer.comm import Comm, SoloComm, connect
from trainer.config.config import Config, load_config
from trainer.engine.engine import Engine, Prepared
from trainer.engine.machine import uses_cuda
from trainer.engine.memory import keep_freed_memory, objects_frozen
from trainer.engine.wiring import model_name
from trainer.errors import TrainerError
from trainer.exchange.exchange import ContentRequest
from trainer.exchange.routing import Int64
from trainer.ids.tables import RowRequest
from trainer.plan.cost import Piece, Rates
from trainer.runs.known_statistics import with_rough_statistics
from trainer.runs.stores import store_places
from trainer.samples.batch import Batch
from trainer.samples.prefetch import ReadAhead, prepare_ahead
from trainer.samples.reader import SampleReader, open_index
from trainer.schema import load_schema

# Rounds of steps by themselves and of the real loop take turns, so that a slow moment of the machine hits both alike.
_ROUNDS, _STEPS, _LOOP_STEPS, _WARM_UP = 3, 4, 6, 2
_READ_S = 3.0
_MOST_JITTER = 0.1
# Which of the engine's own stages make one piece of the plan; "gather" is timed by itself.
_STAGES: dict[str, tuple[str, ...]] = {
    "serve": ("unique", "gather"),
    "embed": ("embed images", "embed backward"),
    "worker": ("exchange vectors", "worker forward", "worker backward", "exchange gradients", "update dense"),
    "rows": ("update id rows",),
}


@dataclass(frozen=True)
class Measured:
    """What one machine says of itself; `loop_s` is a step of the real loop with `loop_units` of work."""

    rates: Rates
    loop_s: float
    loop_units: Mapping[str, float]


class Timed(NamedTuple):
    """One step: units of work, seconds of the pieces, cores that were busy while it prepared and while it computed."""

    units: dict[str, float]
    seconds: dict[str, float]
    cores: tuple[float, float]


class Bench:
    """The engine of one rank without others, over the configuration's samples and store."""

    def __init__(self, config: Config, threads: int) -> None:
        keep_freed_memory()
        torch.set_num_threads(threads)
        pa.set_cpu_count(threads)
        comm, data = SoloComm(), config.data
        schema = load_schema(Path(data.schema_file) if data.schema_file else None)
        self._index = open_index(comm, data.samples, "train", schema, data.train_days)
        self._schema, self._config = with_rough_statistics(comm, self._index, schema), config
        store = FeatureStore.open(data.store)
        self._partition = FeaturePartition.load(
            store, cache_dir=data.cache_dir, missing=data.missing, threads=threads, version=data.store_version
        )
        name = store_places(config, schema)[0].name
        cuda = uses_cuda(config.run.device, torch.cuda.is_available(), comm.moves_cuda_tensors)
        self.engine = Engine(
            comm,
            schema,
            {name: self._partition},
            config.model,
            config.optim,
            config.exchange,
            seed=config.train.seed,
            missing=data.missing,
            statistics={name: store.snapshot(data.store_version).statistics()},
            device="cuda" if cuda else "cpu",
        )
        self._service = self.engine.services[name]

    def close(self) -> None:
        """Lets go of the store's rows."""
        self._partition.close()

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of `size` samples in the order of training, epoch after epoch."""
        data = self._config.data
        window = data.shuffle_window_groups if data.shuffle else 1
        seed = self._config.train.seed if data.shuffle else None
        reader = SampleReader(self._index, self._schema, batch_size=size, seed=seed, window_groups=window)
        return itertools.chain.from_iterable(reader.batches(epoch) for epoch in itertools.count())

    def read(self, size: int) -> Piece:
        """Seconds per sample read, over as many whole epochs, or seconds, as it takes."""
        samples, cpu_s, start_s = 0, time.process_time(), time.perf_counter()
        for batch in self.batches(size):
            samples += batch.num_samples
            elapsed_s = time.perf_counter() - start_s
            if elapsed_s > _READ_S or samples >= 2 * self._index.num_samples:
                break
        return Piece(0.0, elapsed_s / samples, (time.process_time() - cpu_s) / elapsed_s)

    def step(self, batch: Batch) -> Timed:
        """One step, nothing beside it; the gather once more, alone."""
        starts = time.perf_counter(), time.process_time()
        prepared = self.engine.prepare(batch)
        middle = time.perf_counter(), time.process_time()
        served = prepared.request.served_S
        images = sum(each.num_unique for each in served if isinstance(each, ContentRequest))
        rows = sum(each.num_unique for each in served if isinstance(each, RowRequest))
        self.engine.train_step(prepared)
        ends = time.perf_counter(), time.process_time()
        milliseconds = cast("dict[str, float]", self.engine.stages.last_ms())
        seconds = {
            name: sum(milliseconds.get(stage, 0.0) for stage in stages) / 1e3 for name, stages in _STAGES.items()
        }
        seconds["gather"] = self._gather_s(batch)
        seconds["route"] = max(0.0, seconds.pop("serve") - seconds["gather"])
        # What the stages leave out, between them, goes with the samples.
        seconds["worker"] += max(0.0, ends[0] - middle[0] - sum(seconds[name] for name in ("embed", "worker", "rows")))
        seconds["route"] += max(0.0, middle[0] - starts[0] - seconds["route"] - seconds["gather"])
        cores = _ratio(starts, middle), _ratio(middle, ends)
        samples = float(batch.num_samples)
        units = {"gather": images, "embed": images, "rows": rows, "route": samples, "worker": samples}
        return Timed({name: float(count) for name, count in units.items()}, seconds, cores)

    def loop(self, size: int) -> list[float]:
        """Seconds of steps of the real loop: read ahead, prepared ahead, computed."""
        engine, depth = self.engine, max(1, self._config.data.prefetch_batches)
        seconds: list[float] = []
        with closing(ReadAhead(self.batches(size), depth)) as ahead, objects_frozen():

            def prepare() -> Prepared:
                return engine.prepare(next(ahead))

            with closing(prepare_ahead(_WARM_UP + _LOOP_STEPS, prepare)) as coming:
                start_s = time.perf_counter()
                for result in coming:
                    engine.train_step(result())
                    seconds.append(time.perf_counter() - start_s)
                    start_s = time.perf_counter()
        return seconds[_WARM_UP:]

    def _gather_s(self, batch: Batch) -> float:
        """Of the features of a batch, which each E asks for by itself."""
        keys_of_model: dict[str, list[Int64]] = {}
        for field in self.engine.fields:
            if field.kind == "content":
                name = model_name(field, self._config.model)
                keys_of_model.setdefault(name, []).append(batch.fields[field.name].values_N)
        unique = [np.unique(np.concatenate(keys)) for keys in keys_of_model.values()]
        start_s = time.perf_counter()
        gathered = [self._service.gather(keys_Q) for keys_Q in unique]
        elapsed_s = time.perf_counter() - start_s
        for each in gathered:
            self._service.release(each)
        return elapsed_s


def measure(comm: Comm, config: Config, large: int, threads: int) -> Measured:
    """The stages at `large` samples and at a third of it, mean over ranks; called by every rank."""
    small, loop_s, spreads = max(1, large // 3), [], []
    timed: dict[int, list[Timed]] = {small: [], large: []}
    with closing(Bench(config, threads)) as bench:
        comm.agree(None)
        read = bench.read(large)
        for _ in range(_ROUNDS):
            for size in timed:
                comm.agree(None)
                steps = [bench.step(batch) for batch in itertools.islice(bench.batches(size), _WARM_UP + _STEPS)]
                timed[size] += steps[_WARM_UP:]
            comm.agree(None)
            seconds = bench.loop(large)
            loop_s.append(statistics.mean(seconds))
            spreads.append(_spread(seconds))
    low, high = _median(timed[small]), _median(timed[large])
    pieces = {name: line(low, high, name) for name in ("gather", "embed", "rows", "route", "worker")}
    mine = (read, pieces, statistics.median(loop_s), statistics.median(spreads), high.units)
    found = comm.allgather_object(mine, name="plan.rates")
    mean = {name: _mean([each[1][name] for each in found]) for name in pieces}
    jitter = min(_MOST_JITTER, statistics.mean(each[3] for each in found))
    rates = Rates(read=_mean([each[0] for each in found]), **mean, jitter=jitter)
    units = {"read": float(large), **found[0][4]}
    return Measured(rates, statistics.mean(each[2] for each in found), units)


def line(small: Timed, large: Timed, name: str) -> Piece:
    """The piece through two sizes; where a larger one was not slower, or the constant is negative, all is per unit."""
    cores = max(0.1, large.cores[0] if name in ("gather", "route") else large.cores[1])
    units, seconds = large.units[name], large.seconds[name]
    if units <= small.units[name]:
        return Piece(seconds if units == 0 else 0.0, seconds / units if units else 0.0, cores)
    slope = (seconds - small.seconds[name]) / (units - small.units[name])
    fixed = seconds - slope * units
    if slope <= 0 or fixed < 0:
        return Piece(0.0, seconds / units, cores)
    return Piece(fixed, slope, cores)


def _spread(seconds: Sequence[float]) -> float:
    """Standard deviation over the median, from the median deviation: one slow step in ten is no spread."""
    middle = statistics.median(seconds)
    return 1.4826 * statistics.median(abs(each - middle) for each in seconds) / middle


def _median(steps: Sequence[Timed]) -> Timed:
    """Of every figure by itself."""
    cores = statistics.median(each.cores[0] for each in steps), statistics.median(each.cores[1] for each in steps)
    return Timed(_medians([each.units for each in steps]), _medians([each.seconds for each in steps]), cores)


def _medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def _mean(pieces: Sequence[Piece]) -> Piece:
    return Piece(*(statistics.mean(values) for values in zip(*(asdict(p).values() for p in pieces), strict=True)))


def _ratio(start: tuple[float, float], end: tuple[float, float]) -> float:
    """Cores that were busy between two looks at (wall, processor) time."""
    return (end[1] - start[1]) / max(1e-9, end[0] - start[0])


if __name__ == "__main__":
    os.environ.setdefault("CUDA_LAUNCH_BLOCKING", "1")  # so that a stage ends when its kernels do
    ranks = connect()
    try:
        result = measure(ranks, load_config(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]))
    except (TrainerError, FeatureStoreError) as failure:
        sys.exit(f"error: {' '.join(str(failure).split())}")
    if ranks.rank == 0:
        sys.stdout.write(json.dumps(asdict(result)) + "\n")
    ranks.close()
