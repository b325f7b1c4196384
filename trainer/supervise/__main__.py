"""Train a run on several hosts, and start it again by itself when a rank or a host is lost."""

import asyncio
import contextlib
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from featurestore.console.commandline import CommandApp, run_app
from trainer.errors import ConfigError
from trainer.launch import By
from trainer.supervise.hosts import count_slots, hosts_of
from trainer.supervise.run import claimed, parse_command
from trainer.supervise.supervisor import Printer, Supervisor

EXAMPLES = """
Examples:

    crossmedia supervise --max-np 2 -- crossmedia train --set run.name=a

    crossmedia supervise --min-np 2 --max-np 8 --hosts a:4,b:4 -- crossmedia train --set run.name=a

    crossmedia supervise --hosts-file hosts.txt --ssh 'ssh -p 2222' -- crossmedia train --set run.name=a

    crossmedia supervise --max-np 2 -- crossmedia daily --samples-of-days data/samples

Each start is a generation: all ranks, on the hosts that answer. If a rank dies, fails or hangs (run.deadline_s), or a
host is lost, the others are ended, and the next generation continues from the newest checkpoint, with as many ranks as
there are slots. When more hosts answer, the run writes a checkpoint and continues with all of them. All steps, samples
and losses are those of an undisturbed run. SIGTERM and Ctrl-C end it after a checkpoint, a second one at
once; the same command continues it.
Exit codes: 0 done, 1 given up, 2 wrong settings (never started again), 130 stopped.
"""

Hosts = Annotated[
    str | None, typer.Option(metavar="HOST:SLOTS,...", help="Where ranks may run.", show_default="localhost:MAX_NP")
]
HostsFile = Annotated[
    Path | None, typer.Option(help="A file with a line HOST:SLOTS for each; it is read again now and then.")
]
app = CommandApp(rich_markup_mode="markdown")


@app.command(epilog=EXAMPLES)
def main(
    command: Annotated[
        list[str],
        typer.Argument(metavar="-- COMMAND", help="crossmedia train, or daily, with its arguments."),
    ],
    hosts: Hosts = None,
    hosts_file: HostsFile = None,
    min_np: Annotated[int, typer.Option(min=1, help="Fewest ranks; with fewer slots it waits.")] = 1,
    max_np: Annotated[int | None, typer.Option(min=1, help="Most ranks.", show_default="all slots")] = None,
    by: Annotated[By, typer.Option(help="What the ranks speak to each other by.")] = By.HOROVOD,
    ssh: Annotated[str, typer.Option(help="The command that reaches other hosts.")] = "ssh",
    fruitless: Annotated[
        int,
        typer.Option("--max-restarts-without-progress", min=0, help="In a row, without a newer checkpoint between."),
    ] = 5,
    backoff: Annotated[
        float,
        typer.Option("--backoff-s", min=0, help="Before the first restart without progress; doubled up to 60."),
    ] = 5,
    rejoin_after: Annotated[
        float,
        typer.Option("--rejoin-after-s", min=0, help="From a start to a stop that takes more hosts in, at least."),
    ] = 300,
    wait_for_hosts: Annotated[
        float, typer.Option("--wait-for-hosts-s", min=0, help="Give up after so long with fewer than --min-np slots.")
    ] = 600,
    stop_grace: Annotated[
        float, typer.Option("--stop-grace-s", min=0, help="For ranks to write a checkpoint when they are stopped.")
    ] = 300,
    lease: Annotated[
        float,
        typer.Option("--lease-s", min=1, help="A host that does not hear from here for so long ends its ranks itself."),
    ] = 20,
) -> None:
    """Train a run on several hosts, and start it again by itself when a rank or a host is lost."""
    if max_np is not None and max_np < min_np:
        raise ConfigError(f"--max-np {max_np} is less than --min-np {min_np}")
    read_hosts = hosts_of(hosts, hosts_file, max_np)
    slots = count_slots(read_hosts())
    if slots < min_np and hosts_file is None:
        raise ConfigError(f"--min-np {min_np}: --hosts {hosts} has {slots} slots")
    train = parse_command(command)
    with claimed(train.folder), contextlib.closing(Printer()) as printer:
        supervisor = Supervisor(
            command=train,
            read_hosts=read_hosts,
            printer=printer,
            min_ranks=min_np,
            max_ranks=max_np or sys.maxsize,
            by=by,
            ssh=shlex.split(ssh),
            most_fruitless=fruitless,
            backoff_s=backoff,
            rejoin_after_s=rejoin_after,
            wait_for_hosts_s=wait_for_hosts,
            stop_grace_s=stop_grace,
            lease_s=lease,
        )
        raise typer.Exit(asyncio.run(supervisor.run()))


if __name__ == "__main__":
    run_app(app)
