"""The folder of a run becomes the run's: config.yaml, what it does not continue of another run removed, ids.parquet."""

from featurestore.published.paths import FarPath, RunPath, remove_all
from trainer.config.config import save_config
from trainer.errors import ConfigError
from trainer.runs import accepted
from trainer.runs.folder import finished, in_the_way, naming_run_dir, same_place
from trainer.runs.known_statistics import write_statistics
from trainer.runs.open import Run
from trainer.samples import dictionary
from trainer.samples.columns import rules_of


def claim_folder(run: Run) -> list[RunPath]:
    """Make the run's folder and write config.yaml and, where the samples have texts, ids.parquet.

    Returns the checkpoints that run.overwrite removed before that. Every rank calls it, when all else is open. Killed
    at any point, it leaves the earlier run at one of its steps, or this one at its first. Raises ConfigError where the
    folder cannot be written to.
    """

    def claim() -> list[RunPath]:
        with naming_run_dir(run.config):
            run.place.claim([each.path for each in run.passed_over])
            _check_still_free(run)
            removed = _overwrite(run) if run.config.run.overwrite else []
            run.folder.mkdir(parents=True, exist_ok=True)
            if resumed_folder(run) != run.folder:
                (run.folder / dictionary.FILE).unlink(missing_ok=True)  # of a run that this one does not continue
            save_config(run.config, run.folder / "config.yaml")
            write_statistics(run.folder, run.schema, run.origin.data)
        return removed

    removed_paths = run.comm.on_rank_0(claim)
    _keep_dictionary(run)
    return removed_paths


def _keep_dictionary(run: Run) -> None:
    """Write ids.parquet, unless the run is continued and has it.

    It begins with the entries of the run whose ID rows this one continues, or begins with, in another folder. Raises
    DataError, ConfigError on all ranks together.
    """
    if run.comm.on_rank_0((run.folder / dictionary.FILE).is_file):
        return  # `claim_folder` removes another run's
    warm = run.warm_start
    before = run.comm.on_rank_0(lambda: resumed_folder(run))
    if before is None and warm is not None and "ids" in warm.parts:
        before = warm.path.absolute().parent.parent
    earlier = before / dictionary.FILE if before is not None else None
    with naming_run_dir(run.config):
        dictionary.write_dictionary(run.comm, run.folder, run.train_reader.index, rules_of(run.schema), earlier)


def resumed_folder(run: Run) -> RunPath | None:
    """Give the folder of the run that wrote the checkpoint which this one continues: its own, or another one's."""
    if run.resumed is None:
        return None
    path = run.resumed.absolute()
    is_own = run.checkpoints.is_dir() and same_place(path.parent, run.checkpoints)
    return run.folder if is_own else path.parent.parent


def _overwrite(run: Run) -> list[RunPath]:
    """Remove what this run does not continue of the one in its folder; returns the checkpoints among that."""
    removed = in_the_way(run.folder, run.resumed)
    (run.folder / "report.json").unlink(missing_ok=True)
    run.place.remove(removed)
    if not finished(run.checkpoints):
        remove_all(run.folder / "tensorboard")
        remove_all(run.local / "tensorboard")
        (run.folder / accepted.FILE).unlink(missing_ok=True)
    return removed


def _check_still_free(run: Run) -> None:
    """Raise ConfigError where another start of the run has published a checkpoint since this one looked."""
    if isinstance(run.folder, FarPath) and not run.config.run.overwrite and in_the_way(run.folder, run.resumed):
        raise ConfigError(
            f"{run.folder} has a new checkpoint, of another start of this run: start one alone, with run.resume=latest"
        )
