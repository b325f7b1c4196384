"""Every variant on the ranks that horovodrun starts, or alone:  python worker.py STORE OUT PART

Rank 0 writes to OUT what the engine did: losses on every rank, number of collectives, first gradients, final state; the
same with delays; and how each rank ended where one fails.
"""

import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import date
from functools import cache
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import torch
from packing import packed, unpacked
from worlds import batch_of, batch_of_file, make_store, slice_of_rank, steps

from featurestore import FeatureStore
from featurestore.format.codec import FeatureStatistics
from featurestore.lookup.partition import FeaturePartition
from tests.trainer.main_worker import ending_of
from tests.variants import SCHEMA_OF_LEARNED, SEED, VARIANTS, Variant, has_other_ways, runs_of
from trainer.comm import Comm, connect
from trainer.config import Config, RunConfig, TrainConfig
from trainer.engine.engine import Engine
from trainer.errors import DataError
from trainer.models.ctr import CtrModel
from trainer.optim import BETA1
from trainer.samples.index import open_index
from trainer.samples.reader import Batch
from trainer.samples.survey import measure
from trainer.stages import Stages, prepare_ahead


def urls_of(store: FeatureStore, variant: Variant) -> dict[str, str]:
    """Where the stores of a variant are, by name."""
    made = "-compact" if variant.compact else ""
    return {"images": f"{store.url}{made}", **({"texts": f"{store.url}-texts"} if variant.texts else {})}


@cache
def statistics_of(url: str) -> FeatureStatistics:
    return FeatureStore.open(url).snapshot().statistics()


@cache
def partition_of(url: str, rank: int, num_ranks: int, missing: str) -> FeaturePartition:
    """Read once for all variants: no run changes it."""
    cache = f"{url}-cache-{num_ranks}"
    return FeaturePartition.load(FeatureStore.open(url), rank, num_ranks, cache_dir=cache, missing=missing)


def engine_of(
    comm: Comm, store: FeatureStore, variant: Variant, dtype: str, device: str = "cpu", *, held: bool = False
) -> Engine:
    """An engine over this rank's part of the stores."""
    urls = urls_of(store, variant)
    partitions = {name: partition_of(url, comm.rank, comm.size, variant.missing) for name, url in urls.items()}
    statistics = {name: statistics_of(url) for name, url in urls.items()}
    own = {"train": TrainConfig(seed=SEED), "run": RunConfig(features_on_device=held or "auto")}
    config = Config(model=variant.config(dtype), optim=variant.optim, **own)
    known = statistics if variant.standardized else None
    with patch.object(CtrModel, "starts_by_xavier", not variant.biased):
        return Engine(comm, variant.schema, partitions, config, statistics=known, device=device)


def run(
    comm: Comm, store: FeatureStore, variant: Variant, dtype: str, device: str = "cpu", *, held: bool = False
) -> dict[str, object]:
    """All steps; each one is prepared in a thread beside the one before, as in a real run."""
    if variant.numbers:
        index = open_index(comm, f"{store.url}-samples", "train", SCHEMA_OF_LEARNED)
        variant = replace(variant, statistics=measure(comm, index, SCHEMA_OF_LEARNED))
    engine = engine_of(comm, store, variant, dtype, device, held=held)
    initial = {name: parameter.detach().clone() for name, parameter in engine._dense.parameters.items()}
    batches = []
    for number, samples in enumerate(steps(variant)):
        mine = slice_of_rank(samples, variant.deal, number, comm.rank, comm.size)
        batches.append(
            batch_of_file(mine, samples, variant.schema) if variant.words else batch_of(mine, samples, variant)
        )
    losses, gradients, coming, steps_of_day = [], {}, iter(batches), variant.steps_of_day or len(batches)
    CALLS.clear()
    for first in range(0, len(batches), steps_of_day):
        if variant.steps_of_day:
            engine.expire_rows(date(2026, 1, 1 + first // steps_of_day))
        with contextlib.closing(prepare_ahead(steps_of_day, lambda: engine.prepare(next(coming)))) as prepared:
            for number, result in enumerate(prepared, first):
                losses.append(engine.train_step(result()).loss)
                if number == 0:
                    gradients = first_gradients(comm, engine)
    calls = {name: count for name, count in Counter(CALLS).items() if name.startswith("step.")}
    return {
        "initial": initial,
        "mean_and_std": {name: mean_and_std(url) for name, url in urls_of(store, variant).items()},
        "decoded": decoded(urls_of(store, variant)["images"]) if variant.compact else None,
        "losses_P": comm.allgather_object(losses),
        "calls": calls,
        "gradients": gradients,
        "trained": engine.dense_state() | gathered(comm, engine.shard_state()),
        "evicted": tallied(comm, engine, "evicted"),
        "expired": tallied(comm, engine, "expired"),
    }


def tallied(comm: Comm, engine: Engine, what: str) -> dict[str, int]:
    """A count of all ranks, by exact table."""
    own = {name: table.tally() for name, table in engine.tables.items()}
    counts = Counter[str]()
    for each in comm.allgather_object({name: tally[what] for name, tally in own.items() if what in tally}):
        counts.update(each)
    return dict(counts)


def mean_and_std(url: str) -> list[torch.Tensor]:
    """Of each dimension of a store's features."""
    statistics = statistics_of(url)
    return [torch.from_numpy(np.array(values)) for values in (statistics.mean_D, statistics.std_D)]


def decoded(url: str) -> dict[int, torch.Tensor]:
    """Key -> its stored numbers, in float64."""
    snapshot = FeatureStore.open(url).snapshot()
    keys = snapshot.keys()
    values = snapshot.codec.decode(snapshot.get(keys)).astype(np.float64)
    return dict(zip(keys.tolist(), torch.from_numpy(values), strict=True))


def first_gradients(comm: Comm, engine: Engine) -> dict[str, torch.Tensor]:
    """Gradients of the first step: dense ones as the optimiser saw them, those of rows out of the first momentum, where
    the optimiser keeps one."""
    gradients = {name: p.grad.clone() for name, p in engine._dense.parameters.items()}
    for name, table in engine.tables.items():
        own = {n: v / (1 - BETA1) for n, v in table.export_shards().items() if n.endswith("/momentum")}
        if shards := gathered(comm, own):
            gradients[name] = torch.cat([shards[n] for n in sorted(shards)])
    return gradients


def gathered(comm: Comm, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of all ranks."""
    return {name: each for part in comm.allgather_object(packed(tensors)) for name, each in unpacked(part).items()}


def endings(comm: Comm, store: FeatureStore) -> dict[str, list[str]]:
    """How every rank ends where a key has no feature, and where the last rank cannot read its samples."""
    missing = Variant({"images": "both"}, lacking=True)
    engine, result = engine_of(comm, store, missing, "float64"), {}
    samples = steps(missing)[0]
    batch = batch_of(slice_of_rank(samples, "even", 0, comm.rank, comm.size), samples)

    def unreadable() -> Iterator[Batch]:
        if comm.rank == comm.size - 1:
            raise DataError("day=1.parquet: label=7 is not 0 or 1")
        yield batch

    for name, batches in {"missing_key": iter([batch]), "reader": unreadable()}.items():
        started = time.monotonic()
        result[name] = ending_of(comm, lambda batches=batches: engine.train_step(next(engine.prepared(batches))))
        assert time.monotonic() - started < 20
    return result | ending_in_e(comm, store)


def ending_in_e(comm: Comm, store: FeatureStore) -> dict[str, list[object]]:
    """How every rank ends where E fails on the last one; whether the engine is then as it was before, and goes on."""
    usual = VARIANTS["plain"]
    engine = engine_of(comm, store, usual, "float64")
    batches = [batch_of(slice_of_rank(each, "even", 0, comm.rank, comm.size), each) for each in steps(usual)[:3]]
    engine.train_step(engine.prepare(batches[0]))  # momentum moves what gets no gradient
    before = {name: value.clone() for name, value in (engine.dense_state() | engine.shard_state()).items()}
    embed = engine.services["images"].embed
    failing = Mock(side_effect=MemoryError("no room for what E makes")) if comm.rank == comm.size - 1 else embed
    with patch.object(engine.services["images"], "embed", failing):
        ending_P = ending_of(comm, lambda: engine.train_step(engine.prepare(batches[1])))
    after = engine.dense_state() | engine.shard_state()
    moved = [name for name, value in before.items() if not torch.equal(after[name], value)]
    losses = comm.allgather_object(engine.train_step(engine.prepare(batches[2])).loss)
    return {"embed": ending_P, "moved": comm.allgather_object(moved), "losses": losses}


CALLS: list[str] = []


def count_collectives(comm: Comm) -> None:
    """Notes the name of every collective of tensors in CALLS."""

    def noted(method):
        def call(*args, name, **kwargs):
            CALLS.append(name)
            return method(*args, name=name, **kwargs)

        return call

    for method in ("alltoall", "start_allreduce_sum_"):
        setattr(comm, method, noted(getattr(comm, method)))


def delays(rank: int) -> AbstractContextManager[object]:
    """Within the block every stage begins late, on rank 0 by up to 2 ms, on the others by up to 12."""
    timed, draw = Stages.timed, random.Random(rank)

    def late(self, *stage):
        time.sleep(draw.uniform(0, 0.012 if rank else 0.002))
        return timed(self, *stage)

    return patch.object(Stages, "timed", late)


def main(store_url: str, out: Path, part: str) -> None:
    """Run the variants of a part, one after the other, in one job: ranks take seconds to start.

    One rank makes the stores before, so it has to run first.
    """
    comm = connect()
    count_collectives(comm)
    if comm.size == 1:
        make_store(Path(store_url))
    store = FeatureStore.open(store_url)
    results: dict[str, object] = {
        f"{name}/{dtype}": run(comm, store, VARIANTS[name], dtype) for name, dtype in runs_of(comm.size, part)
    }
    if has_other_ways(comm.size, part):
        results |= other_ways(comm, store)
    if part != "rest":
        results["endings"] = endings(comm, store)
    if comm.rank == 0:
        out.write_bytes(packed(results))
    comm.close()
    comm.close()  # a second time it is nothing


def other_ways(comm: Comm, store: FeatureStore) -> dict[str, object]:
    """Run the usual variant late, and with features held in memory."""
    results: dict[str, object] = {}
    with delays(comm.rank):
        results["plain delayed"] = {**run(comm, store, VARIANTS["plain"], "float64"), "initial": None}
    for name in ("plain", "sum_rank_without_data"):
        results[f"{name} held"] = {**run(comm, store, VARIANTS[name], "float64", held=True), "initial": None}
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
