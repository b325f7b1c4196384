"""Counts, widths and a machine of round numbers, for costs by hand."""

from trainer.plan.cost import BatchCounts, KeyCounts, Machine, NetworkSpeed, StageRate, StageRates, Widths

COUNTS = BatchCounts(
    samples=1000,
    ranks=4,
    decoded=300.0,
    images=KeyCounts(references=8000, asked=1000, served=1100, unique=2000, owned=600),
    ids=KeyCounts(references=9000, asked=2000, served=2200, unique=5000, owned=1300),
)
WIDTHS = Widths(image_vector_bytes=48, id_vector_bytes=48.0, dense_bytes=4_000_000)
RATES = StageRates(
    read=StageRate(0.0, 1e-5),
    route=StageRate(0.001, 2e-6),
    gather=StageRate(0.0, 1e-6),
    embed=StageRate(0.01, 2e-5),
    worker=StageRate(0.002, 1e-5),
    rows=StageRate(0.0, 1e-7),
)
NETWORK = NetworkSpeed(call_s=1e-3, latency_s=1e-4, link_bytes_per_s=1e9, local_bytes_per_s=5e9)
MACHINE = Machine(RATES, NETWORK, cores=8)
