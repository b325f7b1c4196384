"""Checks before a cluster is used: a safe address; for dask-submit also workers, versions and packages."""

import ipaddress
import socket
from collections.abc import Mapping
from typing import Any

import dask
from distributed import Client
from distributed.comm.addressing import parse_address, parse_host_port
from distributed.comm.registry import backends

from pipeline.errors import (
    InsecureSchedulerError,
    MissingPackagesError,
    MissingWorkersError,
    SchedulerUnreachableError,
    VersionMismatchError,
)

SAFE_PROTOCOLS = ("tls", "wss", "inproc")  # encrypted, or inside this process
INSECURE_KEY = "crossmedia.insecure-scheduler"  # of Dask's configuration
INSECURE_VARIABLE = "DASK_CROSSMEDIA__INSECURE_SCHEDULER"  # the same as an environment variable
OUR_PACKAGES = ("featurestore", "pipeline")
COMPARED_PACKAGES = ("python", "dask", "distributed")
IMPORT_OURS = "\n".join(f"import {package}" for package in OUR_PACKAGES)


def check_address(address: str, insecure: bool = False) -> None:
    """Raise InsecureSchedulerError unless `address` is encrypted, or every IP of its host is loopback.

    Not where a person has accepted it: by `insecure` (dask-submit's option), or for jobs and all by Dask's
    configuration. Raises SchedulerUnreachableError when the host's name has no IP, or the address no meaning.
    """
    if insecure or dask.config.get(INSECURE_KEY, False) in (True, 1):
        return
    try:
        protocol, location = parse_address(address)
        if protocol in SAFE_PROTOCOLS:
            return
        if protocol not in backends:
            raise ValueError(f"{protocol}:// is none of {', '.join(sorted(backends))}")
        host, _ = parse_host_port(location, 0)
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise SchedulerUnreachableError(address, str(error)) from error
    if not all(ipaddress.ip_address(sockaddr[0]).is_loopback for *_, sockaddr in found):
        raise InsecureSchedulerError(
            f"the scheduler {address} is beyond loopback and without TLS: Dask sends pickles, so anyone who reaches"
            " that port can run code on every worker. Use tls:// with certificates in Dask's configuration"
            " (distributed.comm.tls), or on a network that you trust pass --insecure to dask-submit, or set"
            f" {INSECURE_VARIABLE}=True for jobs that you run without it"
        )


def wait_for_workers(client: Client, address: str, count: int, timeout_s: float) -> None:
    """Return once `count` workers are there. Raises MissingWorkersError after `timeout_s`."""
    if count == 0:
        return
    try:
        client.wait_for_workers(count, timeout=timeout_s)
    except TimeoutError as error:
        raise MissingWorkersError(
            f"{len(client.nthreads())} of {count} workers are at {address} after {timeout_s:g} s; start more with"
            f" `dask worker {address}`, or lower --wait-workers, or raise --timeout"
        ) from error


def check_versions(versions: Mapping[str, Any]) -> None:
    """Raise VersionMismatchError where major.minor of Python, dask or distributed differ from the client's.

    `versions` is what `Client.get_versions()` gives. A patch version may differ: Dask's protocol does not.
    """
    here = versions["client"]["packages"]
    nodes = {"the scheduler": versions["scheduler"]} | {f"worker {a}": node for a, node in versions["workers"].items()}
    differences = [
        f"{package} is {theirs} on {name} and {here[package]} here"
        for name, node in nodes.items()
        for package in COMPARED_PACKAGES
        if _major_minor(theirs := node["packages"].get(package)) != _major_minor(here[package])
    ]
    if differences:
        raise VersionMismatchError(
            f"versions on the cluster differ from those here: {'; '.join(differences)}. Install the same ones on every"
            " machine"
        )


def _major_minor(version: str | None) -> list[str] | None:
    return version.split(".")[:2] if version else None


def check_packages(client: Client) -> None:
    """Raise MissingPackagesError, with the reason, for workers that cannot import our packages.

    `exec` and not a function of ours is sent: to read that, the worker would have to import us.
    """
    answers = client.run(exec, IMPORT_OURS, {}, on_error="return")
    failures = [f"{worker}: {answer!r}" for worker, answer in answers.items() if isinstance(answer, Exception)]
    if failures:
        raise MissingPackagesError(
            f"{len(failures)} workers cannot import this project ({'; '.join(failures[:3])}). Install it on every"
            " worker's machine, in the environment that runs `dask worker`: `pip install .` in the project's folder"
        )
