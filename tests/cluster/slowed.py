"""What workers of Dask load first (--preload), so that a test can do something in the midst of a job.

Each image and each piece of a log takes longer, and adds a line to the file BEGUN.
"""

import os
import time
from pathlib import Path

from pipeline.features import part
from pipeline.samples import groups


def slowed(work):
    def slow(*args):
        with Path(os.environ["BEGUN"]).open("a") as begun:
            print(os.getpid(), file=begun)
        time.sleep(0.3)
        return work(*args)

    return slow


part.prepare, groups.shuffle_piece = slowed(part.prepare), slowed(groups.shuffle_piece)
