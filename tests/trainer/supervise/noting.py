"""`trainer.main` as a script for trainer.supervise: ranks write what they do in each step into NOTES/<generation>.

With PAUSE_S in the environment, each step takes so long at least.
"""

import os
from pathlib import Path

from featurestore.console.commandline import run_app
from tests.trainer.runs.resumed.mortal import note_steps
from trainer.main import app
from trainer.supervise import NUMBER

NOTES, PAUSE_S = "NOTES", "PAUSE_S"

if __name__ == "__main__":
    note_steps(Path(os.environ[NOTES]) / os.environ[NUMBER], pause_s=float(os.environ.get(PAUSE_S, "0")))
    run_app(app)
