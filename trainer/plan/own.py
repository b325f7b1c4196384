"""A plan for a person's own samples and store: batches drawn, this machine measured, both put together."""

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from featurestore.lookup.embedding import EmbeddingModel
from featurestore.lookup.partition import physical_memory_bytes
from trainer.config.config import Config
from trainer.engine.machine import uses_cuda
from trainer.engine.wiring import model_name, table_shapes
from trainer.ids.optimizers import state_of
from trainer.ids.tables import owned_bytes
from trainer.models.build import build_model
from trainer.models.fields import used_fields, width_of
from trainer.plan.build import StoredBytes, TrainingPlan, build
from trainer.plan.calibrate import Calibration, is_large
from trainer.plan.cost import Machine, Widths
from trainer.plan.sample import PlanQuestion, SampledKeys, sample

_FLOAT_BYTES = 4
_MOST_LOAD = 0.5
_DAY = re.compile(r"day=(\d{4}-\d{2}-\d{2})")

Say = Callable[[str], None]


def plan_own(config: Config, question: PlanQuestion, say: Say) -> TrainingPlan:
    """Draw batches, measure this machine, and make the plan. Raises TrainerError, FeatureStoreError."""
    question.check()
    busy = busy_machine(os.getloadavg()[0], len(os.sched_getaffinity(0)))
    say("reading samples")
    sampled = sample(config, question)
    locals_ = sorted({min(count, question.ranks_per_machine) for count in (1, *question.ranks)})
    machines: dict[int, Machine] = {}
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        calibration = Calibration(config, question, sampled, Path(folder))
        for local in locals_:
            say(f"measuring this machine with {local} rank{'s' if local > 1 else ''} on it")
            machines[local] = calibration.machine(local)
    return build(
        title=f"{config.data.samples} and {config.data.store}, snapshot {sampled.snapshot.version}",
        counts_of=lambda ranks: sampled.counts(question.global_size(ranks), ranks),
        ranks=question.ranks,
        base_ranks=1,
        widths=widths(config, sampled),
        machines=machines,
        stored=stored_bytes(config, sampled),
        samples_per_day=samples_per_day(question, sampled)[0],
        assumptions=assumptions(question, sampled, machines, config.exchange.reuse_steps),
        warnings=busy,
        device="cuda" if uses_cuda(config.run.device, torch.cuda.is_available(), None) else "cpu",
    )


def widths(config: Config, sampled: SampledKeys) -> Widths:
    """Return the bytes of what travels, from the schema, the model's settings and the store."""
    model, dim = config.model, sampled.snapshot.info.dim
    on_wire = 2 if config.exchange.wire_dtype == "bfloat16" else _FLOAT_BYTES
    content = {model_name(f, model): f for f in used_fields(sampled.schema, model) if f.kind == "content"}
    widths_of_model = [width_of(field, model) for field in content.values()]
    with torch.device("meta"):
        networks = [
            build_model(sampled.schema, model),
            *(EmbeddingModel(dim, model.embed_hidden, width) for width in widths_of_model),
        ]
    dense = sum(parameter.numel() for network in networks for parameter in network.parameters())
    return Widths(
        feature_bytes=sampled.snapshot.info.row_bytes,
        image_vector_bytes=max(widths_of_model) * on_wire,
        id_vector_bytes=sampled.id_vector_floats * on_wire,
        dense_bytes=dense * _FLOAT_BYTES,
    )


def stored_bytes(config: Config, sampled: SampledKeys) -> StoredBytes:
    """Tell what is held: the store's rows, all ID tables with their optimiser's state, and in how much memory."""
    info, shapes = sampled.snapshot.info, table_shapes(used_fields(sampled.schema, config.model), config.model)
    state = state_of(config.optim)
    return StoredBytes(
        rows=sampled.snapshot.num_rows,
        dim=info.dim,
        dtype=info.dtype,
        shards=info.num_shards,
        table_bytes=sum(owned_bytes(shape, 0, 1, state, torch.float32) for shape in shapes),
        table_shards=config.model.table_shards,
        machine_memory_bytes=physical_memory_bytes(),
        copied=config.train.checkpoint_beside,
    )


def busy_machine(load: float, cores: int) -> list[str]:
    """Return a line of advice where other programs keep many cores busy (`load`): a measurement says little then."""
    if load <= _MOST_LOAD * cores:
        return []
    return [f"This machine was busy before it was measured ({load:.2g} of {cores} cores, the last minute): repeat."]


def samples_per_day(question: PlanQuestion, sampled: SampledKeys) -> tuple[float, str]:
    """Return the samples of a day, and where the number is from."""
    if question.samples_per_day is not None:
        return question.samples_per_day, "as given"
    days = {found.group(1) for group in sampled.index.row_groups if (found := _DAY.search(group.file))}
    total = sampled.index.num_samples
    if not days:
        return total, "all training samples, as their files name no day; --samples-per-day says otherwise"
    return total / len(days), f"the training samples of {len(days)} days, by the names of their files"


def assumptions(
    question: PlanQuestion, sampled: SampledKeys, machines: Mapping[int, Machine], reuse_steps: int
) -> list[str]:
    """List the assumptions, a line each; `machines` by ranks on one machine."""
    per_machine, speed = question.ranks_per_machine, question.link_bytes_per_s * 8 / 1e9
    per_day, origin = samples_per_day(question, sampled)
    lines = [
        f"Every machine is like this one, with {per_machine} rank{'s' if per_machine > 1 else ''} on it; "
        f"they are joined by a network of {speed:g} Gbit/s each way with {question.latency_s * 1e6:g} us for a message "
        "(--network, --latency-us); nobody else uses it.",
        f"A day of logs is {per_day:,.0f} samples: {origin}.",
        "Features lie in memory (or in the cache of files): see the bytes that a rank holds. ID rows count twice where "
        "checkpoints are written during the training, from a copy (train.checkpoint_beside).",
        "Store in worker: samples carry the features of each group once, come over the same network, cost nothing to "
        "decode but a copy, and E runs once per occurrence. Store in server: a rank's unique features travel a step "
        "ahead. ID vectors, reading and the worker model are those of the exchange in both.",
        "Evaluation, checkpoints and the start of a run are left out.",
    ]
    lines += [
        f"Measured with {local} on a machine: a step of the real loop takes {machine.interference:.2f} times what its "
        f"stages say; steps vary by {machine.rates.jitter:.1%}; a collective costs {machine.network.call_s * 1e3:.2g} "
        f"ms, a rank moves {machine.network.local_bytes_per_s / 1e9:.2g} GB/s."
        for local, machine in machines.items()
    ]
    if reuse_steps:
        lines.append(
            f"exchange.reuse_steps={reuse_steps}: E was measured at one rank, with the share of vectors that it reuses."
        )
    lines += _extrapolated(question, sampled)
    if is_large(sampled.snapshot.info, sampled.snapshot.num_rows):
        lines.append(
            "The store is larger than a quarter of this machine's memory: drawn features stood in for it while E "
            "and the gather were measured."
        )
    return lines


def _extrapolated(question: PlanQuestion, sampled: SampledKeys) -> list[str]:
    """Say which figures go beyond the data, and by what law."""
    lines = []
    largest = max(question.global_size(ranks) for ranks in question.ranks)
    for name, known in (("images", sampled.images), ("ids", sampled.ids)):
        law, drawn = known.curve.beyond, known.curve.points[-1].samples
        if known.curve.is_extrapolated(largest):
            how = f"Zipf's law with exponent {law.exponent:.2g} over {law.keys:,.3g} keys" if law else "Heaps' law"
            error = known.curve.error
            known = f"; fitted to half of them it was {error:.1%} off at all of them" if error is not None else ""
            lines.append(f"Batches above {drawn:,} samples are extrapolated: {name} by {how}{known}.")
    return lines
