"""What is checked before a cluster is used: a safe address, equal versions, our packages."""

import re

import pytest
from distributed import Client

from pipeline.cluster.tasks import check_address, check_packages, check_versions
from pipeline.errors import ClusterError, InsecureSchedulerError, SchedulerUnreachableError


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "127.8.9.1:1", "tcp://localhost:1", "tcp://[::1]:1"])
def test_loopback_is_accepted(address):
    check_address(address)


@pytest.mark.parametrize("address", ["tls://192.0.2.1:8786", "wss://192.0.2.1:8786", "inproc://192.0.2.1/7/1"])
def test_encrypted_address_is_accepted(address):
    check_address(address)


@pytest.mark.parametrize("address", ["tcp://192.0.2.1:8786", "192.0.2.1:8786", "ws://192.0.2.1:1", "tcp://0.0.0.0:1"])
def test_open_address_beyond_loopback_is_refused(address):
    with pytest.raises(InsecureSchedulerError, match="without TLS"):
        check_address(address)


def test_name_counts_by_what_it_resolves_to(monkeypatch):
    import socket

    found = {"inside": ["127.0.0.1", "::1"], "outside": ["192.0.2.1"], "both": ["127.0.0.1", "192.0.2.1"]}
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: [(0, 0, 0, "", (ip, 0)) for ip in found[host]])
    check_address("tcp://inside:8786")
    for host in ("outside", "both"):
        with pytest.raises(InsecureSchedulerError, match=host):
            check_address(f"tcp://{host}:8786")


@pytest.mark.parametrize("address", ["tcp://no-such-host.invalid:1", "gopher://127.0.0.1:1", "tcp://[::1"])
def test_address_without_a_meaning_is_named(address):
    with pytest.raises(SchedulerUnreachableError, match=re.escape(address)):
        check_address(address)


def versions(**of_worker: str) -> dict:
    here = {"python": "3.11.4.final.0", "dask": "2026.8.0", "distributed": "2026.8.0"}
    node = {"packages": here}
    return {
        "client": node,
        "scheduler": node,
        "workers": {"tcp://w:1": node, "tcp://w:2": {"packages": here | of_worker}},
    }


@pytest.mark.parametrize("same", [{}, {"python": "3.11.9.final.0"}, {"dask": "2026.8.1"}, {"numpy": "1.0.0"}])
def test_equal_versions_pass(same):
    check_versions(versions(**same))


@pytest.mark.parametrize(
    ("package", "version"), [("python", "3.12.4.final.0"), ("dask", "2026.7.0"), ("distributed", "2025.8.0")]
)
def test_other_versions_are_named(package, version):
    here = versions()["client"]["packages"][package]
    with pytest.raises(ClusterError, match=f": {package} is {version} on worker tcp://w:2 and {here} here. "):
        check_versions(versions(**{package: version}))


def test_missing_package_on_the_scheduler_is_a_mismatch():
    with pytest.raises(ClusterError, match="dask is None on the scheduler"):
        check_versions(versions() | {"scheduler": {"packages": {"python": "3.11.1", "distributed": "2026.8.0"}}})


def test_workers_without_this_project_are_named(cluster, monkeypatch):
    with Client(cluster) as client:
        check_packages(client)
        monkeypatch.setattr("pipeline.cluster.tasks.IMPORT_OURS", "import featurestore, no_such_package")
        with pytest.raises(ClusterError, match="no_such_package") as caught:
            check_packages(client)
    assert all(f"{worker.address}: " in str(caught.value) for worker in cluster.workers.values())
    assert f"{len(cluster.workers)} workers cannot" in str(caught.value) and "pip install" in str(caught.value)
