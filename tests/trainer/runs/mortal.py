"""`trainer.main` on ranks that write down the samples of every step, and of which the last one dies if it is told to.

Arguments: the folder of the notes (notes.py), the step in which the last rank gets SIGKILL (0: none), then settings.
"""

import os
import sys
from pathlib import Path

from tests.trainer.runs.notes import note_steps
from trainer.config.config import load_config
from trainer.main import on_ranks, train


def main() -> None:
    notes, die_at, settings = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    rank, size = int(os.environ.get("HOROVOD_RANK", "0")), int(os.environ.get("HOROVOD_SIZE", "1"))
    note_steps(notes, rank, size, die_at)
    sys.exit(on_ranks(lambda: load_config(settings=settings), train))


if __name__ == "__main__":
    main()
