"""Ranks that are started once, for many command lines: to start ranks takes long.

Argument: a folder. Each rank runs the Python arguments of FOLDER/0.json, 1.json, ... as they come, in this process and
with the ranks of the first one, and writes FOLDER/<number>.<rank>.json: exit code and output. `end` ends all.
"""

import contextlib
import io
import itertools
import json
import sys
import time
import traceback
import warnings
from pathlib import Path
from unittest import mock

from featurestore.console import commandline
from tests.running.spared import freeze_for_good
from tests.trainer import forks
from trainer import comm as comm_module
from trainer.comm import connect


def main() -> None:
    folder = Path(sys.argv[1])
    comm = connect()
    kind = type(comm)
    freeze_for_good()  # what is imported lives as long as the process
    with mock.patch.object(kind, "close"), mock.patch.object(comm_module, "connect", kind):
        run_all(folder, comm.rank)
    comm.close()


def run_all(folder: Path, rank: int) -> None:
    """Run each line that comes, until the end."""
    for number in itertools.count():
        asked = folder / f"{number}.json"
        while not asked.exists():
            if (folder / "end").exists():
                return
            time.sleep(0.02)
        result = folder / f"{number}.{rank}"
        result.write_text(json.dumps(run(json.loads(asked.read_text()))))
        result.rename(f"{result}.json")


def run(arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of `python ARGUMENTS`, which begin with `-m MODULE` or a script."""
    out, code = io.StringIO(), 0
    with (
        warnings.catch_warnings(),
        mock.patch.object(sys, "argv", sys.argv),
        mock.patch.object(sys, "path", [sys.path[0], *sys.path]),
        mock.patch.object(commandline, "end_process", sys.exit),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        try:
            forks.run(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code)
        except BaseException:
            code = 1
            traceback.print_exc()
    return code, out.getvalue()


if __name__ == "__main__":
    main()
