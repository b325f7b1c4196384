"""Training on samples that lie on S3, where connections are cut while it reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from featurestore.storage.storage import Storage
from tests.proxy import Fault, Request, proxy_before
from tests.servers import environment_of
from tests.trainer.runs.legs import Killed, assert_no_step_or_sample_is_lost

Places = Any


def test_cut_connections_lose_and_repeat_no_sample(
    places: Places, settings_of: Callable[..., list[str]], s3_endpoint: str, s3_url: str, tmp_path: Path
) -> None:
    """Two ranks on S3 take the samples, step by step, of one rank on a disk, and have its losses."""
    steps, samples = 40, places.folder / "samples"  # 40: most of two epochs
    for file in samples.glob("*/*.parquet"):
        Storage(s3_url).write_bytes(f"{file.parent.name}/{file.name}", file.read_bytes())
    on_disk = Killed(tmp_path / "disk", settings_of(tmp_path / "disk", steps, 1000)).leg(0, ranks=1)
    reads = 0

    def cut(request: Request) -> Fault | None:
        nonlocal reads
        if request.method != "GET" or "/train/" not in request.path:
            return None
        reads += 1
        return {3: Fault.CUT, 6: Fault.CUT_ANSWER}.get(reads % 8)

    with proxy_before(s3_endpoint) as proxy, environment_of(proxy.endpoint):
        far = Killed(tmp_path / "s3", settings_of(tmp_path / "s3", steps, 1000, data__samples=s3_url))
        proxy.rule = cut
        on_s3 = far.leg(0, ranks=2)
    assert_no_step_or_sample_is_lost([on_s3], on_disk, steps)
    assert min(proxy.faults.count(fault) for fault in (Fault.CUT, Fault.CUT_ANSWER)) > 5
