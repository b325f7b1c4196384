"""dask-submit: checks and names a cluster, and becomes the script that runs on it.

Also `dask submit`, through Dask's entry-point group dask_cli; hence click, which Dask itself uses, and not typer.
Dask's own commands import this file, on workers too: Dask and our packages are imported where they are needed.
"""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.problems import Problem

EXAMPLES = """Examples:
  dask-submit jobs/extract_features.py
  dask-submit -n 4 --threads-per-worker 1 crossmedia samples --logs data/logs
  dask-submit --scheduler tls://scheduler:8786 --wait-workers 8 crossmedia extract --images s3://shop/images
  dask-submit --scheduler-file cluster.json --insecure crossmedia samples

Exit codes: the script's own, 143 when SIGTERM ends it; 1 when the cluster cannot be used; 2 for a mistake in the
command line or a scheduler that is refused."""

LEAST_MEMORY = 128 << 20
MOST = 1024  # workers of a machine, and threads of a worker
MEMORY_HELP = "Of one local worker: 4GB, 512MiB, auto, or a share of the machine's memory, as 0.25."
PROGRAM = "crossmedia"
"""Stands for a script: the command, whether it is on the path or not."""
MOST_S = 1e6  # what clocks of operating systems take, and twelve days


def _memory_limit(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    from distributed.worker_memory import parse_memory_limit

    try:
        limit = parse_memory_limit(value or None, 1, logger=logging.getLogger(__name__))
    except (ValueError, OverflowError) as error:
        raise click.BadParameter(Problem.NOT_A_SIZE.of(value)) from error
    if value == "" or (limit is not None and limit < LEAST_MEMORY):
        raise click.BadParameter(Problem.TOO_LITTLE_MEMORY.of(value))
    return value


class _Script(click.Path):
    """A file, or the command crossmedia, also where a folder is called so."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return Path(PROGRAM) if value == PROGRAM else super().convert(value, param, ctx)


def _finite(_: click.Context, __: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(Problem.NOT_SECONDS.of(value))
    return value


@click.command(
    "submit",
    epilog=EXAMPLES,
    context_settings={
        "allow_interspersed_args": False,
        "help_option_names": ["-h", "--help"],
        "max_content_width": 120,
    },
)
@click.option("--scheduler", metavar="ADDRESS", help="A running scheduler, as tcp://HOST:PORT or tls://HOST:PORT.")
@click.option(
    "--scheduler-file",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file that `dask scheduler --scheduler-file FILE` writes.",
)
@click.option("-n", "--workers", metavar="N", type=click.IntRange(1, MOST), help="A local cluster of N workers.")
@click.option("--threads-per-worker", metavar="T", type=click.IntRange(1, MOST), help="Default: cores / N.")
@click.option("--memory-limit", metavar="M", callback=_memory_limit, help=MEMORY_HELP)
@click.option(
    "--wait-workers",
    metavar="N",
    type=click.IntRange(0, MOST * MOST),
    default=1,
    show_default=True,
    help="Start the script once a running scheduler has N workers; of a local one all are there.",
)
@click.option(
    "--timeout",
    "timeout_s",
    metavar="S",
    callback=_finite,
    type=click.FloatRange(min=0, max=MOST_S, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds for the scheduler to answer and the workers to come.",
)
@click.option("--insecure", is_flag=True, help="Accept a scheduler beyond loopback without TLS.")
@click.argument("script", type=_Script(exists=True, dir_okay=False, path_type=Path))
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def submit(context: click.Context, /, script: Path, args: Sequence[str], **_: object) -> None:
    """Run the Python SCRIPT with its ARGS and a Dask cluster, which `pipeline.cluster.tasks` finds by itself.

    SCRIPT is a file, or the word crossmedia, whose commands take a local cluster's size themselves, too.
    The cluster is the scheduler of --scheduler, --scheduler-file, DASK_SCHEDULER_ADDRESS or DASK_SCHEDULER_FILE.
    Without any of these, or with -n, --threads-per-worker or --memory-limit, it is a local one that begins and ends
    with the script's connection to it. Our options go before SCRIPT; all that follows is for the script, whose process
    takes the place of this one.
    """
    from featurestore.console.commandline import STOPPED, STOPPED_BY_USER, say_error
    from pipeline.errors import ClusterError

    try:
        environment = os.environ | _environment(context.params) | {"PYTHONUNBUFFERED": "1"}
    except ClusterError as error:
        say_error(error)
        context.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo(STOPPED_BY_USER, err=True)
        context.exit(STOPPED)
    program = ["-m", PROGRAM] if str(script) == PROGRAM else [str(script)]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *program, *args], environment)


@contextlib.contextmanager
def cluster_of_job(words: Sequence[str]) -> Iterator[None]:
    """Let `connect` find the cluster of these options of dask-submit in this process, until the end of the block.

    Raises ClusterError, click.ClickException.
    """
    environment = _environment(submit.make_context("dask-submit", [*words, PROGRAM]).params)
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _environment(options: Mapping[str, Any]) -> dict[str, str]:
    """Choose the cluster by the options, else by the environment, and say it in variables that `connect` reads.

    A running scheduler is checked, and printed; its address goes before a file's. Raises UsageError, ClusterError.
    """
    from pipeline.cluster import tasks

    scheduler, file, timeout_s = options["scheduler"], options["scheduler_file"], options["timeout_s"]
    local = {name: options[name] for name in ("workers", "threads_per_worker", "memory_limit")}
    is_local = any(value is not None for value in local.values())
    if (scheduler is not None) + (file is not None) + is_local > 1:
        raise click.UsageError(Problem.SEVERAL_CLUSTERS.of())
    address = scheduler
    if file is not None:
        address = tasks.address_in_file(file, timeout_s)
    elif address is None and not is_local:
        address = tasks.configured_address(timeout_s)
    if address is None:
        return {tasks.LOCAL_VARIABLE: json.dumps(local)}
    tasks.check_address(address, options["insecure"])
    deadline_s = time.monotonic() + timeout_s
    with tasks.ended_by_sigterm(), tasks.open_client(address, timeout_s) as client:
        tasks.wait_for_workers(client, address, options["wait_workers"], max(0.1, deadline_s - time.monotonic()))
        tasks.check_packages(client)
        tasks.print_cluster(client)
    accepted = {tasks.INSECURE_VARIABLE: "True"} if options["insecure"] else {}  # as `connect` checks it again
    return {"DASK_SCHEDULER_ADDRESS": address, tasks.LOCAL_VARIABLE: ""} | accepted


def main() -> None:
    """Run the console script dask-submit."""
    from featurestore.console.commandline import STOPPED, report_usage

    try:
        code = submit.main(prog_name="dask-submit", standalone_mode=False)
    except click.ClickException as error:
        sys.exit(report_usage(error))
    except click.Abort:
        sys.exit(STOPPED)
    sys.exit(code)
