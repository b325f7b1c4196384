"""Extraction and samples on a Dask cluster over TLS: scheduler, workers and client are on hosts of their own."""

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from tests.cluster import buckets
from tests.cluster.dask_hosts import DASK_SUBMIT, EXTRACT, IMAGES, SAME_ROWS, DaskHosts, upload_images
from tests.cluster.hosts import ROOT, Network, network, python_words
from tests.pipeline.samples.rows import all_bytes, random_logs, write

JOBS = ROOT / "jobs"


@pytest.fixture(scope="module")
def net(namespaces: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    with network(tmp_path_factory.mktemp("hosts"), ["head", "a", "b", "client"], ssh=False) as net:
        yield net


@pytest.fixture(scope="module")
def s3(net: Network) -> dict[str, str]:
    return buckets.serve_s3(net, "head")


@pytest.fixture(scope="module")
def dask(net: Network, s3: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> DaskHosts:
    hosts = DaskHosts(net, tmp_path_factory.mktemp("dask"), s3)
    hosts.open()
    return hosts


@pytest.mark.slow
def test_an_extraction_whose_workers_host_dies_has_the_rows_of_a_calm_one(
    dask: DaskHosts, s3: dict[str, str], tmp_path: Path
) -> None:
    """Images and store on S3; half of the images are computed when the power of a worker's host fails."""
    log, head = tmp_path / "log.txt", dask.net["head"]
    upload_images(dask.net, "head", tmp_path / "images", s3)
    extract = [JOBS / "extract_features.py", "--images", "s3://shop/images", *EXTRACT, "--num-shards", "4"]
    head.run(*python_words(*extract, "--store", "s3://shop/calm"), env=s3)
    job = dask.submit(*extract, "--store", "s3://shop/features", log=log)
    dask.wait_for_work(IMAGES // 2, job, log)
    dask.net.kill("b")
    assert job.wait(200) == 0, log.read_text() + dask.log()
    head.run(*python_words("-c", SAME_ROWS, "s3://shop/features", "s3://shop/calm"), env=s3)
    dask.net.revive("b")
    dask.start_worker("b")


@pytest.mark.slow
def test_samples_whose_workers_host_dies_have_the_bytes_of_calm_ones(dask: DaskHosts, tmp_path: Path) -> None:
    """Files in between lie on a disk that all workers see."""
    logs, log, calm = tmp_path / "logs", tmp_path / "log.txt", tmp_path / "calm"
    rows = random_logs(random.Random(5))
    write(logs, *([part[n::8] for n in range(8)] for part in rows))
    build = [JOBS / "build_samples.py", "--logs", logs]
    subprocess.run([sys.executable, *build, "--samples", calm], check=True, timeout=200)
    job = dask.submit(*build, "--samples", tmp_path / "samples", log=log)
    dask.wait_for_work(6, job, log)
    dask.net.kill("b")
    assert job.wait(200) == 0, log.read_text() + dask.log()
    assert all_bytes(tmp_path / "samples") == all_bytes(calm)
    dask.net.revive("b")
    dask.start_worker("b")


def test_a_plain_address_is_refused_and_so_is_the_certificate_of_another_authority(dask: DaskHosts) -> None:
    client = dask.net["client"]
    hello = [JOBS / "build_samples.py", "--help"]
    plain = client.run(DASK_SUBMIT, "--scheduler", "tcp://head:8786", *hello, check=False)
    assert plain.returncode == 2 and "beyond loopback and without TLS" in plain.stderr
    none = client.run(DASK_SUBMIT, "--scheduler", dask.address, *hello, check=False)
    assert none.returncode != 0 and "needs TLS certificates" in none.stderr
    stranger = dask.tls(client, trustme.CA())
    refused = client.run(DASK_SUBMIT, "--scheduler", dask.address, *hello, env=stranger, check=False)
    assert refused.returncode != 0 and "Traceback" not in refused.stderr and "error:" in refused.stderr
