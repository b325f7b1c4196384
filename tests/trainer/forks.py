"""A process that has imported what ranks need, and forks them: each import of torch takes two seconds of a processor.

It reads lines of JSON. `words` and `log`, and `ranks` with the variables of each: it forks one for each, which runs
`python WORDS`, and answers with their ids. `of`, such ids: it answers with their exit codes, null while they run.
"""

import contextlib
import importlib
import json
import os
import runpy
import signal
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

from tests.running.spared import freeze_for_good

IMPORTED = (
    "horovod.torch",
    "jobs.score",
    "s3fs",
    "tests.trainer.main_worker",
    "tests.trainer.runs.resumed.mortal",
    "trainer.daily",
    "trainer.engine.engine",
    "trainer.evaluate",
    "trainer.evaluation.predict",
    "trainer.loop.training",
    "trainer.prerank",
    "trainer.runs.open",
)
"""Which import torch, the store and all else that takes long."""
STARTED = set[int]()
ENDED: dict[int, int] = {}


def main() -> None:
    for module in IMPORTED:
        with contextlib.suppress(ModuleNotFoundError):  # there are tests without Horovod
            importlib.import_module(module)
    freeze_for_good()
    for line in sys.stdin:
        asked = json.loads(line)
        if "words" in asked:
            answer: object = [fork(asked["words"], each, asked["log"]) for each in asked["ranks"]]
        else:
            answer = [code_of(each) for each in asked["of"]]
        print(json.dumps(answer), flush=True)
    for rank in STARTED:
        if code_of(rank) is None:  # whoever asked for it was killed
            os.kill(rank, signal.SIGKILL)


def fork(words: list[str], variables: Mapping[str, str], log: str) -> int:
    """The id of a new process that runs `python WORDS` with these variables alone; what it prints is added to `log`."""
    process = os.fork()
    if process == 0:
        os.environ.clear()
        os.environ.update(variables)
        with Path(os.devnull).open() as nothing, Path(log).open("a") as out:
            for own, other in ((0, nothing), (1, out), (2, out)):
                os.dup2(other.fileno(), own)
        run(words)
        sys.exit()  # as any process ends
    STARTED.add(process)
    ENDED.pop(process, None)  # ids come again
    return process


def run(words: list[str]) -> None:
    """Run `-m MODULE` or a script, with its arguments."""
    warnings.filterwarnings("ignore", message=".* found in sys.modules", category=RuntimeWarning)  # of runpy
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


def code_of(rank: int) -> int | None:
    """Its exit code, -9 of one that was killed, where it has ended."""
    if rank not in ENDED and (status := os.waitpid(rank, os.WNOHANG))[0]:
        ENDED[rank] = os.waitstatus_to_exitcode(status[1])
    return ENDED.get(rank)


if __name__ == "__main__":
    main()
