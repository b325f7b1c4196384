"""Train a run on several hosts, and start it again by itself when a rank or a host is lost."""

import asyncio
import contextlib

import typer

from featurestore.console.commandline import CommandApp, run_app, takes
from trainer.supervise.run import claimed, parse_command
from trainer.supervise.supervisor import Printer, SuperviseOptions, Supervisor

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
app = CommandApp(rich_markup_mode="markdown")


@app.command(epilog=EXAMPLES)
@takes(SuperviseOptions)
def main(options: SuperviseOptions) -> None:
    """Train a run on several hosts, and start it again by itself when a rank or a host is lost."""
    options.check()
    train = parse_command(options.command)
    with claimed(train.folder), contextlib.closing(Printer()) as printer:
        raise typer.Exit(asyncio.run(Supervisor(options, train, printer).run()))


if __name__ == "__main__":
    run_app(app)
