"""dask-submit: a script that runs on a cluster as a child process.

Also `dask submit`, through Dask's entry-point group dask_cli; hence click, which Dask itself uses, and not typer.
Dask's own commands import this file, on workers too: Dask and our packages are imported where they are needed.
"""

import contextlib
import dataclasses
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Self

import click

EXAMPLES = """\b
Examples:
  dask-submit jobs/extract_features.py
  dask-submit -n 4 --threads-per-worker 1 crossmedia samples --logs data/logs
  dask-submit --scheduler tls://scheduler:8786 --wait-workers 8 crossmedia extract --images s3://shop/images
  dask-submit --scheduler-file cluster.json --insecure crossmedia samples

Exit codes: the script's own, 128 + n when signal n ended it; 1 when the cluster cannot be used; 2 for a mistake in
the command line or a scheduler that is refused."""

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
        raise click.BadParameter(f"{value!r} is not a size such as 4GB, 512MiB or auto") from error
    if value == "" or (limit is not None and limit < LEAST_MEMORY):
        raise click.BadParameter(f"{value!r} is below 128 MiB, and a worker does not start with less; try 1GB or auto")
    return value


class _Script(click.Path):
    """A file, or the command crossmedia, also where a folder is called so."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return Path(PROGRAM) if value == PROGRAM else super().convert(value, param, ctx)


def _finite(_: click.Context, __: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number of seconds")
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
    help="Start the script once N workers are there. Default: 1, or all of a local cluster.",
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
def submit(
    context: click.Context,
    scheduler: str | None,
    scheduler_file: Path | None,
    workers: int | None,
    threads_per_worker: int | None,
    memory_limit: str | None,
    wait_workers: int | None,
    timeout_s: float,
    insecure: bool,
    script: Path,
    args: Sequence[str],
) -> None:
    """Run the Python SCRIPT with its ARGS and a Dask cluster, which `pipeline.cluster.tasks` finds by itself.

    SCRIPT is a file, or the word crossmedia, whose commands take a local cluster's size themselves, too.
    The cluster is the scheduler of --scheduler, --scheduler-file, DASK_SCHEDULER_ADDRESS or DASK_SCHEDULER_FILE.
    Without any of these, or with -n, --threads-per-worker or --memory-limit, it is a local one that ends with the
    script. Our options go before SCRIPT; all that follows is for the script.
    """
    from featurestore.console.commandline import STOPPED, STOPPED_BY_USER
    from pipeline.errors import ClusterError

    local = LocalSize(workers, threads_per_worker, memory_limit)
    _check_one_cluster(scheduler, scheduler_file, local)
    try:
        with ScriptRunner() as runner:
            address = _remote_address(scheduler, scheduler_file, local, timeout_s)
            with _prepared_cluster(address, local, wait_workers, timeout_s, insecure) as address:
                program = ["-m", PROGRAM] if str(script) == PROGRAM else [str(script)]
                code = runner.run([sys.executable, *program, *args], script_environment(address, insecure))
    except ClusterError as error:
        _say(f"error: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        _say(STOPPED_BY_USER)
        code = STOPPED
    context.exit(code)


@contextlib.contextmanager
def cluster_of_job(words: Sequence[str]) -> Iterator[None]:
    """Prepare the cluster of these options of dask-submit for a job in this process, and close it in the end.

    Raises ClusterError, click.ClickException.
    """
    options = submit.make_context("dask-submit", [*words, PROGRAM]).params
    local = LocalSize(options["workers"], options["threads_per_worker"], options["memory_limit"])
    timeout_s, insecure = options["timeout_s"], options["insecure"]
    _check_one_cluster(options["scheduler"], options["scheduler_file"], local)
    address = _remote_address(options["scheduler"], options["scheduler_file"], local, timeout_s)
    with _prepared_cluster(address, local, options["wait_workers"], timeout_s, insecure) as address:
        before = dict(os.environ)
        os.environ.update(script_environment(address, insecure))
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _check_one_cluster(scheduler: str | None, scheduler_file: Path | None, local: "LocalSize") -> None:
    if (scheduler is not None) + (scheduler_file is not None) + local.is_given > 1:
        raise click.UsageError(
            "--scheduler, --scheduler-file, and -n, --threads-per-worker, --memory-limit (a local cluster) exclude "
            "each other; give one of the three"
        )


@dataclasses.dataclass(frozen=True)
class LocalSize:
    """The size of a local cluster by the command line; None leaves it to `local_cluster`."""

    workers: int | None
    threads_per_worker: int | None
    memory_limit: str | None

    @property
    def is_given(self) -> bool:
        return any(value is not None for value in dataclasses.astuple(self))


def _remote_address(scheduler: str | None, file: Path | None, local: LocalSize, timeout_s: float) -> str | None:
    """Find the running scheduler to use, None for a local cluster. Options go before the environment."""
    if scheduler is not None:
        return scheduler
    from pipeline.cluster.tasks import address_in_file, configured_address

    if file is not None:
        return address_in_file(file, timeout_s)
    return None if local.is_given else configured_address(timeout_s)


@contextlib.contextmanager
def _prepared_cluster(
    address: str | None, local: LocalSize, wait_workers: int | None, timeout_s: float, insecure: bool
) -> Iterator[str]:
    """Give the scheduler's address, checked, with its workers; a local cluster where `address` is None."""
    from pipeline.cluster.tasks import check_address, local_cluster

    if address is None:
        with local_cluster(local.workers, local.threads_per_worker, local.memory_limit) as cluster:
            address = cluster.scheduler_address
            _check_cluster(address, (local.workers or 1) if wait_workers is None else wait_workers, timeout_s)
            yield address
        return
    check_address(address, insecure)
    _check_cluster(address, 1 if wait_workers is None else wait_workers, timeout_s)
    yield address


def _check_cluster(address: str, wait_workers: int, timeout_s: float) -> None:
    """Print the cluster once it is fit to run a script; `timeout_s` is for connecting and waiting together.

    Of other versions of Python or Dask there Dask itself warns, when it connects.
    """
    from pipeline.cluster.tasks import check_packages, open_client, wait_for_workers

    deadline = time.monotonic() + timeout_s
    with open_client(address, timeout_s) as client:
        if "dashboard" in client.scheduler_info()["services"]:
            _say(f"dashboard {client.dashboard_link}")
        wait_for_workers(client, address, wait_workers, max(0.1, deadline - time.monotonic()))
        check_packages(client)
        threads = client.nthreads()
        _say(f"scheduler {address}, workers {len(threads)}, threads {sum(threads.values())}")


def script_environment(address: str, insecure: bool) -> dict[str, str]:
    """Make the script's environment: ours, with the scheduler's address and output that is not buffered.

    The address goes before a file's. Also whether an insecure one was accepted, as `connect` checks it again."""
    from pipeline.cluster.tasks import INSECURE_VARIABLE

    accepted = {INSECURE_VARIABLE: "True"} if insecure else {}
    return dict(os.environ) | accepted | {"DASK_SCHEDULER_ADDRESS": address, "PYTHONUNBUFFERED": "1"}


def _say(text: str) -> None:
    """Print one line on stderr; stdout is the script's."""
    click.echo(f"dask-submit: {text}", err=True)


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


FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SIGNAL_EXIT = 128  # a shell's exit code for a death by signal is this plus the signal's number


class ScriptRunner:
    """Runs a script, and hands it the signals SIGINT, SIGTERM and SIGHUP that come from `with` on.

    Before the script runs they raise KeyboardInterrupt or SystemExit here, while it runs they go to it, and afterwards
    they are ignored, so that closing is not cut short.

    The script's process has its own group, so that a terminal's ctrl-C reaches it once, by way of us. A second signal
    kills the whole group. Use in the main thread; `run` once.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = False
        self._pending: int | None = None
        self._ending = False  # the first signal was passed on
        self._handlers_before: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in FORWARDED:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup asked for that
            self._handlers_before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run `command`, with our output as its output, and return its exit code: 128 + n when signal n ended it.

        Its input is ours too, except a terminal: a background group that reads one is stopped for ever.
        """
        stdin = subprocess.DEVNULL if sys.stdin is not None and sys.stdin.isatty() else None
        sys.stdout.flush()
        sys.stderr.flush()
        self._starting = True  # a signal between fork and assignment must not lose the child
        self._process = subprocess.Popen(list(command), env=dict(environment), stdin=stdin, process_group=0)
        self._starting = False
        if self._pending is not None:
            self._on_signal(self._pending, None)
        code = self._process.wait()
        return SIGNAL_EXIT - code if code < 0 else code

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._starting:
            self._pending = number
        elif not self._ending:
            self._ending = True
            if self._process is None:
                if number == signal.SIGINT:
                    raise KeyboardInterrupt
                raise SystemExit(SIGNAL_EXIT + number)
            self._process.send_signal(number)
        elif self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
