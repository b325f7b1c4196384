"""One job of ranks that follows days, is stopped in the midst of one, and stops early; rank 0 writes what ranks saw.

Arguments: the output file, then settings that all runs share.
"""

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from tests.trainer.main_worker import ending_of, signalling
from trainer.comm import connect
from trainer.config import load_config
from trainer.daily import follow as follow_days
from trainer.main import train

follow = partial(follow_days, first="2026-01-03", continues=True)


def main() -> None:
    out, *shared = Path(sys.argv[1]), *sys.argv[2:]
    comm = connect()

    def outcome(work: Callable, *settings: str) -> list[str]:
        return ending_of(comm, lambda: work(load_config(settings=[*shared, *settings]), comm))

    seen = {"days": outcome(follow, "run.name=days")}
    with signalling(comm, at=2):
        seen["cut"] = [outcome(follow, "run.name=cut") for _ in range(2)]
    seen["after the cut"] = outcome(follow, "run.name=cut")
    # The newest day is not there at first; when it has come, one group of the day before it is gone.
    samples = Path(load_config(settings=shared).data.samples)
    own = samples.with_name("late")
    trained, newest = own / "train/day=2026-01-03.parquet", own / "test/day=2026-01-04.parquet"
    tested = newest.with_name(trained.name)
    if comm.rank == 0:
        shutil.copytree(samples, own)
        newest.unlink()
        trained.rename(tested)
    comm.agree(None)
    late = ("run.name=late", f"data.samples={own}")
    seen["newest missing"] = outcome(follow, *late)
    if comm.rank == 0:
        pq.write_table(pq.read_table(tested, partitioning=None).slice(1), trained)
        tested.unlink()
        shutil.copy(samples / "test" / newest.name, newest)
    comm.agree(None)
    seen["newest there, others late"] = outcome(follow, *late)
    seen["other settings"] = outcome(follow, "run.name=days", "optim.lr=0.5")
    early = ("train.eval_every=4", "train.early_stopping=2", "optim.lr=0.1", "train.keep_checkpoints=1")
    seen["early"] = outcome(train, "run.name=early", "train.epochs=9", *early)
    if comm.rank == 0:
        out.write_text(json.dumps(seen))
    comm.close()


if __name__ == "__main__":
    main()
