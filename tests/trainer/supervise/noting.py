"""`trainer.main` as a script for trainer.supervise: ranks write what they do in each step into NOTES/<generation>.

With PAUSE_S in the environment, each step takes so long at least.
"""

import os
from pathlib import Path

from featurestore.console.commandline import run_app
from tests.trainer.runs.resumed.notes import note_steps
from trainer.main import app
from trainer.supervise import NUMBER

NOTES, PAUSE_S = "NOTES", "PAUSE_S"


def main() -> None:
    names = ("HOROVOD_RANK", "HOROVOD_SIZE") if "HOROVOD_RANK" in os.environ else ("RANK", "WORLD_SIZE")
    rank, size = (int(os.environ.get(name, default)) for name, default in zip(names, "01", strict=True))
    note_steps(Path(os.environ[NOTES]) / os.environ[NUMBER], rank, size, pause_s=float(os.environ.get(PAUSE_S, "0")))
    run_app(app)


if __name__ == "__main__":
    main()
