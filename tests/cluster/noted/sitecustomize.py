"""Found on PYTHONPATH by every Python of a job: ranks write notes of their steps, a folder for each start of the job.

It has to be so, as the batch script itself starts python -m trainer.main. NOTES is the folder; each step takes
PAUSE_S more, so that a test can do something in the midst of a run.
"""

import os
from pathlib import Path

rank = os.environ.get("HOROVOD_RANK", os.environ.get("RANK"))
size = os.environ.get("HOROVOD_SIZE", os.environ.get("WORLD_SIZE"))
if "NOTES" in os.environ and rank is not None and size is not None:
    from tests.trainer.runs.resumed.notes import note_steps

    leg = Path(os.environ["NOTES"]) / f"notes-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    note_steps(leg, int(rank), int(size), pause_s=float(os.environ.get("PAUSE_S", "0")))
