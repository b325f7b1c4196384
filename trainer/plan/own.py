"""A plan for a person's own samples and store: batches drawn, this machine measured, both put together."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from featurestore.lookup.embedding import EmbeddingModel
from featurestore.lookup.mmap import physical_memory_bytes
from trainer.config.config import Config
from trainer.engine.wiring import model_name, table_shapes
from trainer.ids.optimizers import state_of
from trainer.ids.tables import owned_bytes
from trainer.models.build import build_model
from trainer.models.fields import used_fields, width_of
from trainer.plan import standin
from trainer.plan.assumptions import assumptions, samples_per_day
from trainer.plan.build import Plan, Stored, build
from trainer.plan.calibrate import Calibration
from trainer.plan.cost import BatchCounts, Widths, decoded_samples
from trainer.plan.sample import LARGEST_MEASURED, Question, Sampled, sample

_FLOAT_BYTES = 4

Say = Callable[[str], None]


def plan_own(config: Config, question: Question, say: Say) -> Plan:
    """Draws, measures, and computes. Raises TrainerError, FeatureStoreError."""
    question.check()
    say("reading samples")
    sampled = sample(config, question)
    locals_ = sorted({min(count, question.ranks_per_machine) for count in (1, *question.ranks)})
    fits = standin.fits(sampled.snapshot.info, sampled.snapshot.num_rows)
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        measured = config if fits else _with_standin(config, sampled, Path(folder))
        calibration, machines = Calibration(measured, question.link_bytes_per_s, question.latency_s), {}
        for local in locals_:
            say(f"measuring this machine with {local} rank{'s' if local > 1 else ''} on it")
            size = question.sizes(local)[0]
            large = max(1, min(LARGEST_MEASURED, size, sampled.index.num_samples // 4))
            machines[local] = calibration.machine(local, large)
    return build(
        title=f"{config.data.samples} and {config.data.store}, snapshot {sampled.snapshot.version}",
        counts_of=lambda ranks: counts(config, question, sampled, ranks),
        ranks=question.ranks,
        base_ranks=1,
        widths=widths(config, sampled),
        machines=machines,
        stored=_stored(config, sampled),
        samples_per_day=samples_per_day(question, sampled)[0],
        assumptions=assumptions(question, sampled, machines, fits, config.exchange.reuse_steps),
    )


def counts(config: Config, question: Question, sampled: Sampled, ranks: int) -> BatchCounts:
    """Keys of a global batch of `ranks` ranks, and the samples that each of them decodes."""
    size = question.global_size(ranks)
    window = config.data.shuffle_window_groups if config.data.shuffle else 1
    window_samples = sampled.index.num_samples / len(sampled.index.row_groups) * window
    return BatchCounts(
        samples=size,
        ranks=ranks,
        decoded=decoded_samples(size, ranks, window_samples),
        images=sampled.images.keys(size, ranks),
        ids=sampled.ids.keys(size, ranks),
    )


def widths(config: Config, sampled: Sampled) -> Widths:
    """Bytes of what travels, from the schema, the model's settings and the store."""
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


def _with_standin(config: Config, sampled: Sampled, folder: Path) -> Config:
    """The configuration with a small store; images that are not in it are zeros, which cost the same."""
    standin.make(folder / "features", sampled.snapshot.info, sampled.image_keys_U)
    places = {"store": str(folder / "features"), "cache_dir": str(folder / "cache"), "store_version": None}
    return config.model_copy(update={"data": config.data.model_copy(update={**places, "missing": "zeros"})})


def _stored(config: Config, sampled: Sampled) -> Stored:
    info, shapes = sampled.snapshot.info, table_shapes(used_fields(sampled.schema, config.model), config.model)
    state = state_of(config.optim)
    return Stored(
        rows=sampled.snapshot.num_rows,
        dim=info.dim,
        dtype=info.dtype,
        shards=info.num_shards,
        table_bytes=sum(owned_bytes(shape, 0, 1, state, torch.float32) for shape in shapes),
        table_shards=config.model.table_shards,
        machine_memory_bytes=physical_memory_bytes(),
    )
