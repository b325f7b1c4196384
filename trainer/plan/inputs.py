"""A cluster that is written down in a file instead of measured: counts, sizes, speeds and assumptions."""

import dataclasses
import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from featurestore.text import DType
from trainer.config.options import Count
from trainer.config.validate import Section, validated
from trainer.errors import ConfigError
from trainer.files import read_mapping
from trainer.plan.build import FEATURE_ITEM_BYTES, StoredBytes, TrainingPlan, build
from trainer.plan.cost import BatchCounts, Machine, NetworkSpeed, StageRate, StageRates, Widths, step_cost
from trainer.plan.draws import KeyPopulation
from trainer.plan.growth import GrowthCurve, GrowthPoint

PAPER = Path(__file__).parent.parent / "presets" / "plan-paper.yaml"

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
_OTHER_LATENCIES_US = (50.0, 100.0, 400.0)
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SPEED = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?-i:b)(?:its?|ps|it/s)?", re.IGNORECASE)  # B would be bytes


class KeysInput(Section):
    """Keys of one kind: the different ones in numbers of samples, two at least; between and beyond by Heaps' law."""

    references_per_sample: Positive
    unique_of_samples: Annotated[dict[int, Positive], Field(min_length=2)]
    num_shards: Count
    vector_bytes: Positive

    def population(self) -> KeyPopulation:
        """Return the same, as the plan takes it."""
        points = tuple(GrowthPoint(samples, unique) for samples, unique in sorted(self.unique_of_samples.items()))
        return KeyPopulation(self.references_per_sample, GrowthCurve(points), self.num_shards)


class ReferenceInput(Section):
    """A run whose time is known: the compute of a node is what is left of its step without the wire."""

    ranks: Count
    hours: Positive
    samples: Count


class NetworkInput(Section):
    """A network between machines: the latency of a message, a speed, and what an empty collective costs."""

    speed: str
    latency_us: NotNegative
    call_ms: NotNegative

    @field_validator("speed")
    @classmethod
    def _known_unit(cls, value: str) -> str:
        try:
            bytes_per_s(value)
        except ConfigError as failure:
            raise ValueError(str(failure)) from failure
        return value


class PlanInput(Section):
    """A cluster that was not measured but is written down; every line of `assumptions` is printed with the plan."""

    title: str
    global_batch_size: Count
    ranks: Annotated[list[Count], Field(min_length=1)]
    samples_per_day: Count
    images: KeysInput
    ids: KeysInput
    dim: Count
    dtype: DType
    store_rows: Count
    dense_bytes: Count
    reference: ReferenceInput
    network: NetworkInput
    jitter: NotNegative
    assumptions: list[str]

    def counts(self, ranks: int) -> BatchCounts:
        """Count the keys of a global batch on `ranks`."""
        size = self.global_batch_size
        images, ids = (each.population().keys(size, ranks) for each in (self.images, self.ids))
        return BatchCounts(size, ranks, size / ranks, images, ids)

    @property
    def widths(self) -> Widths:
        """Return the bytes of what travels."""
        return Widths(
            self.dim * FEATURE_ITEM_BYTES[self.dtype],
            int(self.images.vector_bytes),
            self.ids.vector_bytes,
            self.dense_bytes,
        )

    def machine(self) -> Machine:
        """Derive a node as fast as the reference run says: all of its time but the wire goes with its images."""
        speed = bytes_per_s(self.network.speed)
        network = NetworkSpeed(self.network.call_ms / 1e3, self.network.latency_us / 1e6, speed, speed)
        known, counts = self.reference, self.counts(self.reference.ranks)
        steps = known.samples / self.global_batch_size
        idle = Machine(_image_bound(0.0, self.jitter), network, cores=1)
        wire_s = step_cost("exchange", counts, self.widths, idle).seconds
        one = dataclasses.replace(idle, rates=_image_bound(1.0, self.jitter))
        per_image_s = (known.hours * 3600 / steps - wire_s) / (
            step_cost("exchange", counts, self.widths, one).seconds - wire_s
        )
        if per_image_s <= 0:
            raise ConfigError(f"reference.hours={known.hours}: the wire alone takes longer; check network and hours")
        return dataclasses.replace(idle, rates=_image_bound(per_image_s, self.jitter))


def load_input(path: Path) -> PlanInput:
    """Load the cluster that a YAML file describes. Raises ConfigError naming the file and the field."""
    return validated(PlanInput, read_mapping(path, "--input ", ConfigError), str(path), ConfigError)


def plan_input(described: PlanInput) -> TrainingPlan:
    """Make the plan of what the file says; efficiency is against its smallest number of ranks."""
    machine, known, network = described.machine(), described.reference, described.network
    derived = (
        f"Compute of a node: {machine.rates.embed.unit_s * 1e6:.3g} us per unique image, which is what {known.hours} h "
        f"for {known.samples:,} samples on {known.ranks} nodes leave when the wire is taken off; it falls with the "
        "number of nodes, but for what the busiest owner has more than the mean.",
        f"Network: {network.speed} each way, {network.latency_us:g} us a message, {network.call_ms:g} ms a collective; "
        "an alltoall is P - 1 messages of each node, a ring allreduce 2 (P - 1); three alltoalls, one of them hidden "
        "behind the step before, and one allreduce a step.",
        f"Steps of a node vary by {described.jitter:.0%}, and the slowest of P nodes counts.",
    )
    stored = StoredBytes(
        rows=described.store_rows,
        dim=described.dim,
        dtype=described.dtype,
        shards=described.images.num_shards,
        table_bytes=0,
        table_shards=described.ids.num_shards,
    )
    return _built(described, stored, [*described.assumptions, *derived, *_sensitivity(described, stored)])


def bytes_per_s(speed: str) -> float:
    """Return the bytes per second of a network speed in bits, as 10Gb, 400Mbit, 1 Gbit/s. Raises ConfigError."""
    found = _SPEED.fullmatch(speed.strip().removesuffix("/s"))
    value = float(found.group(1)) * _UNITS[found.group(2).lower()] / 8 if found else 0.0
    if value <= 0:
        raise ConfigError(f"network speed {speed!r}: write bits (b, not B) per second above zero, as 10Gb or 400Mbit")
    return value


def _image_bound(per_image_s: float, jitter: float) -> StageRates:
    """Return the rates of a node of which only the time per image is known."""
    nothing = StageRate(0.0, 0.0, 0.0)
    embed = StageRate(0.0, per_image_s, 0.0)
    return StageRates(nothing, nothing, nothing, embed, nothing, nothing, jitter)


def _sensitivity(described: PlanInput, stored: StoredBytes) -> list[str]:
    """Say what another latency, which is the least known, would make of the efficiency."""
    lines = []
    for latency_us in _OTHER_LATENCIES_US:
        network = described.network.model_copy(update={"latency_us": latency_us})
        rows = _built(described.model_copy(update={"network": network}), stored, []).rows
        figures = ", ".join(f"{row.efficiency['exchange']:.0%} on {row.ranks}" for row in rows[1:])
        lines.append(f"With {latency_us:g} us a message instead the efficiency would be {figures} nodes.")
    return lines


def _built(described: PlanInput, stored: StoredBytes, assumptions: list[str]) -> TrainingPlan:
    return build(
        title=described.title,
        counts_of=described.counts,
        ranks=sorted(described.ranks),
        base_ranks=min(described.ranks),
        widths=described.widths,
        machines={1: described.machine()},
        stored=stored,
        samples_per_day=described.samples_per_day,
        assumptions=assumptions,
    )
