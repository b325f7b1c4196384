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

from tests.trainer.main_worker import signalling
from trainer.comm import connect
from trainer.config import load_config
from trainer.daily import follow as follow_days
from trainer.engine.engine import Engine
from trainer.main import train

follow = partial(follow_days, first="2026-01-03", continues=True)


def main() -> None:
    out, *shared = Path(sys.argv[1]), *sys.argv[2:]
    comm = connect()

    def outcome(work: Callable, *settings: str) -> list[str]:
        try:
            work(load_config(settings=[*shared, *settings]), comm)
        except Exception as failure:
            return comm.allgather_object(f"{type(failure).__name__}: {failure}")
        return comm.allgather_object("done")

    train_step = Engine.train_step

    def stopped(at: int, work: Callable, *settings: str) -> list[str]:
        """The outcome where rank 1 gets a signal during every run's step number `at`."""
        if comm.rank == 1:
            Engine.train_step = signalling(train_step, at)
        try:
            return outcome(work, *settings)
        finally:
            Engine.train_step = train_step

    def late() -> dict[str, list[str]]:
        """The newest day is not there at first; when it has come, one group of the day before it is gone."""
        samples = Path(load_config(settings=shared).data.samples)
        own = samples.with_name("late")
        trained = own / "train" / "day=2026-01-03.parquet"
        newest = own / "test" / "day=2026-01-04.parquet"
        settings = ("run.name=late", f"data.samples={own}")

        def begin() -> None:
            shutil.copytree(samples, own)
            newest.unlink()
            trained.rename(newest.with_name(trained.name))

        def change() -> None:
            pq.write_table(pq.read_table(newest.with_name(trained.name), partitioning=None).slice(1), trained)
            newest.with_name(trained.name).unlink()
            shutil.copy(samples / "test" / newest.name, newest)

        comm.on_rank_0(begin)
        seen = {"newest missing": outcome(follow, *settings)}
        comm.on_rank_0(change)
        return {**seen, "newest there, others late": outcome(follow, *settings)}

    early = ("train.eval_every=4", "train.early_stopping=2", "optim.lr=0.1", "train.keep_checkpoints=1")
    seen = {
        "days": outcome(follow, "run.name=days"),
        "cut": [stopped(2, follow, "run.name=cut") for _ in range(2)],
        "after the cut": outcome(follow, "run.name=cut"),
        **late(),
        "other settings": outcome(follow, "run.name=days", "optim.lr=0.5"),
        "early": outcome(train, "run.name=early", "train.epochs=9", *early),
    }
    if comm.rank == 0:
        out.write_text(json.dumps(seen))
    comm.close()


if __name__ == "__main__":
    main()
