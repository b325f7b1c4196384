"""Found on PYTHONPATH by every Python of a job: ranks write notes of their steps, a folder for each start of the job.

It has to be so, as the batch script itself starts python -m trainer.main. NOTES is the folder; each step takes
PAUSE_S more, so that a test can do something in the midst of a run.
"""

import os
from pathlib import Path

if "NOTES" in os.environ and {"HOROVOD_RANK", "RANK"} & os.environ.keys():
    from tests.trainer.runs.resumed.mortal import note_steps

    leg = Path(os.environ["NOTES"]) / f"notes-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    note_steps(leg, pause_s=float(os.environ.get("PAUSE_S", "0")))
