"""The cluster of the paper (Ge et al., CIKM 2018, arXiv 1711.06505) as an example; it was not measured.

Figures without a remark are the paper's. What it does not say is assumed: it is marked here, and printed with the plan.
"""

from trainer.plan.cost import BatchCounts, KeyCounts, Machine, NetworkSpeed, Widths, step_cost
from trainer.plan.table import StoredBytes, TrainingPlan, build, most_shards

RANKS = (5, 10, 20, 40)
BATCH, SAMPLES = 60_000, 7_800_000_000  # 2 epochs of 18 days with 3.9 billion
IMAGES = 320_000  # in a batch
IDS = 1_400_000  # in a batch; assumed: no id comes twice
SHARDS = 1024  # XDL places a key by its last ten bits
VECTOR_BYTES = 48  # 12 float32
DENSE_BYTES = 4_600_000  # E is 4096-256-64-12, the MLP about 400-200-80-2; float32
STORE_BYTES = 120_000_000 * 4096 * 4  # the number of images is assumed
HOURS = 62.9  # on the first number of ranks
GBIT, LATENCY_US, CALL_MS = 10.0, 330.0, 1.0  # assumed; the latency was chosen to come near the paper's table
ASSUMPTIONS = (
    "The paper says nothing of its network. 10 Gbit/s Ethernet was usual then; 0.33 ms a message stands for TCP "
    "between busy machines, the software above it, and the wait for the slowest node; it was chosen because it comes "
    "near the paper's 40 nodes, so that figure is a fit, not a proof: 0.05 ms would give 96 and 91 % at 20 and 40.",
    "No key is asked for by two nodes: 1.96 million references are 6.1 for each image, as many as a group has samples. "
    "That is how the paper's 30 MB for images come out: 320,000 x 12 numbers x 4 bytes x 2 ways.",
    "All of a node's compute goes with its unique images, so it waits for the busiest owner.",
)


def plan_paper(latency_us: float = LATENCY_US, call_ms: float = CALL_MS) -> TrainingPlan:
    """Make the plan of the paper's cluster; efficiency is against its smallest number of ranks.

    A node is as fast as the run on these says: all of its time but the wire goes with its images.
    """
    speed, widths, counts = GBIT * 1e9 / 8, Widths(VECTOR_BYTES, VECTOR_BYTES, DENSE_BYTES), _counts(RANKS[0])
    network = NetworkSpeed(call_ms / 1e3, latency_us / 1e6, speed, speed)
    wire_s = step_cost(counts, widths, Machine(0.0, 0.0, 0.0, network)).seconds
    machine = Machine(0.0, (HOURS * 3600 * BATCH / SAMPLES - wire_s) / counts.images.owned, 0.0, network)
    derived = (
        f"Compute of a node: {machine.image_s * 1e6:.3g} us per unique image, which is what {HOURS} h on {RANKS[0]} "
        "nodes leave when the wire is taken off.",
        f"Network: {GBIT:g} Gbit/s each way, {latency_us:g} us a message, {call_ms:g} ms a collective; two alltoalls "
        "and one allreduce a step, besides that of keys, which is hidden behind the step before.",
    )
    return build(
        title="Image Matters (CIKM 2018): 18 days of logs, 2 epochs, one GPU a node",
        counts_of=_counts,
        ranks=RANKS,
        base_ranks=RANKS[0],
        widths=widths,
        machine_of=lambda _: machine,
        stored=StoredBytes(STORE_BYTES, SHARDS, 0, SHARDS),
        samples=SAMPLES,
        assumptions=(*ASSUMPTIONS, *derived),
    )


def _counts(ranks: int) -> BatchCounts:
    """Count the keys of a global batch, of which no two nodes ask for the same; the busiest owner has most shards."""
    share = most_shards(SHARDS, ranks) / SHARDS
    images, ids = (KeyCounts(unique / ranks, unique, unique * share) for unique in (IMAGES, IDS))
    return BatchCounts(BATCH, ranks, BATCH / ranks, images, ids)
