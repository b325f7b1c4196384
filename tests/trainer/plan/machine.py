"""Counts, widths and a machine of round numbers, for costs by hand."""

from trainer.plan.cost import BatchCounts, KeyCounts, Machine, NetworkSpeed, Widths

COUNTS = BatchCounts(
    samples=1000,
    ranks=4,
    decoded=300.0,
    images=KeyCounts(asked=1000, unique=2000, owned=600),
    ids=KeyCounts(asked=2000, unique=5000, owned=1300),
)
WIDTHS = Widths(image_vector_bytes=48, id_vector_bytes=48.0, dense_bytes=4_000_000)
NETWORK = NetworkSpeed(call_s=1e-3, latency_s=1e-4, link_bytes_per_s=1e9, local_bytes_per_s=5e9)
MACHINE = Machine(read_s=1e-5, image_s=2e-5, sample_s=1.2e-5, network=NETWORK)
