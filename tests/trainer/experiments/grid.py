"""One job of ranks that makes a table twice; the second time rank 1's shared disk does not show the reports yet.

Arguments: the folder of the results, the output file, then settings that all runs share.
"""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from trainer.comm import connect
from trainer.experiments.__main__ import make
from trainer.experiments.grid import chosen
from trainer.experiments.runs import Grid


def main() -> None:
    folder, out, *shared = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
    comm = connect()
    seen = []
    for is_late in (False, comm.rank != 0):
        with contextlib.ExitStack() as stack:
            for name in ("stat", "open") if is_late else ():
                stack.enter_context(mock.patch.object(Path, name, late(getattr(Path, name))))
            make(chosen(["exactness"]), range(1), Grid(folder, None, tuple(shared), None, comm), comm)
        seen.append({path.parent.name: path.stat().st_mtime_ns for path in folder.glob("runs/*/report.json")})
    if comm.rank == 0:
        out.write_text(json.dumps(seen))
    comm.close()


def late(look: Callable[..., Any]) -> Callable[..., Any]:
    """`look` that finds no report."""

    def look_late(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "report.json":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return look(path, *args, **options)

    return look_late


if __name__ == "__main__":
    main()
