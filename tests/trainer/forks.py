"""A process that has imported what ranks need, and forks them: each import of torch takes two seconds of a processor.

It reads lines of JSON. `words` and `log`, and `ranks` with the variables of each: it forks one for each, which runs
`python WORDS`, and answers with their ids. `of`, such ids: it answers with their exit codes, null while they run.
"""

import contextlib
import importlib
import json
import os
import runpy
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

from trainer.engine.memory import freeze_for_good

IMPORTED = (
    "horovod.torch",
    "jobs.score",
    "s3fs",
    "tests.trainer.main_worker",
    "tests.trainer.runs.resumed.mortal",
    "trainer.daily",
    "trainer.engine.engine",
    "trainer.evaluate",
    "trainer.evaluation.full",
    "trainer.evaluation.plots",
    "trainer.loop.training",
    "trainer.prerank",
    "trainer.runs.open",
)
"""Which import torch, the store and all else that takes long."""
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


def fork(words: list[str], variables: Mapping[str, str], log: str) -> int:
    """The id of a new process that runs `python WORDS` with these variables alone; what it prints is added to `log`."""
    process, code = os.fork(), 1
    if process == 0:
        try:
            os.environ.clear()
            os.environ.update(variables)
            with Path(os.devnull).open() as nothing, Path(log).open("a") as out:
                for own, other in ((0, nothing), (1, out), (2, out)):
                    os.dup2(other.fileno(), own)
            code = run(words)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return process


def run(words: list[str]) -> int:
    """Exit code of a script with its arguments."""
    sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def code_of(rank: int) -> int | None:
    """Its exit code, -9 of one that was killed, where it has ended."""
    if rank not in ENDED and (status := os.waitpid(rank, os.WNOHANG))[0]:
        ENDED[rank] = os.waitstatus_to_exitcode(status[1])
    return ENDED.get(rank)


if __name__ == "__main__":
    main()
