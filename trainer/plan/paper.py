"""A plan for a cluster that is written down in a file, as the paper's."""

from trainer.plan.build import Plan, Stored, build
from trainer.plan.inputs import PlanInput

_OTHER_LATENCIES_US = (50.0, 100.0, 400.0)


def plan_input(described: PlanInput) -> Plan:
    """The plan of what the file says; efficiency is against its smallest number of ranks."""
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
    stored = Stored(
        rows=described.store_rows,
        dim=described.dim,
        dtype=described.dtype,
        shards=described.images.num_shards,
        table_bytes=0,
        table_shards=described.ids.num_shards,
    )
    return _built(described, stored, [*described.assumptions, *derived, *_sensitivity(described, stored)])


def _sensitivity(described: PlanInput, stored: Stored) -> list[str]:
    """What another latency, which is the least known, would make of the efficiency."""
    lines = []
    for latency_us in _OTHER_LATENCIES_US:
        network = described.network.model_copy(update={"latency_us": latency_us})
        rows = _built(described.model_copy(update={"network": network}), stored, []).rows
        figures = ", ".join(f"{row.efficiency['exchange']:.0%} on {row.ranks}" for row in rows[1:])
        lines.append(f"With {latency_us:g} us a message instead the efficiency would be {figures} nodes.")
    return lines


def _built(described: PlanInput, stored: Stored, assumptions: list[str]) -> Plan:
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
