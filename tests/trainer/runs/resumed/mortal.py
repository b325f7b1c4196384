"""`trainer.main` on ranks that write down the samples of every step, and of which the last one dies if it is told to.

Arguments: the folder of the notes (notes.py), the step in which the last rank gets SIGKILL (0: none), then settings.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

from tests.trainer.runs.resumed.notes import note_steps
from trainer.config import load_config
from trainer.engine.engine import Engine
from trainer.main import on_ranks, train


def place_of(environ: Mapping[str, str]) -> tuple[int, int]:
    """Rank and number of ranks, by the variables of either launcher."""
    rank = environ.get("HOROVOD_RANK") or environ.get("RANK") or "0"
    return int(rank), int(environ.get("HOROVOD_SIZE") or environ.get("WORLD_SIZE") or "1")


def main() -> None:
    notes, die_at, settings = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    rank, size = place_of(os.environ)
    with mock.patch.object(Engine, "train_step", Engine.train_step):  # the process may outlive the run
        note_steps(notes, rank, size, die_at)
        code = on_ranks(lambda: load_config(settings=settings), train)
    sys.exit(code)


if __name__ == "__main__":
    main()
