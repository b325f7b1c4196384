"""Try a small grid of settings on the last training days: crossmedia tune.

Each point of the grid is a run of its own, evaluated after each epoch on days that it is not trained on. The test days
are not looked at. All progress is in the runs' folders, so a job that was killed continues where it stopped.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurestore.console import commandline, output
from featurestore.errors import StorageError
from featurestore.parsing import format_yaml, parse_yaml
from featurestore.published.paths import RunPath, run_path, write_file, write_json_file
from featurestore.spec import differing
from trainer.cli import MoreSettings, Settings, SettingsFile
from trainer.config import Config, load_config, refuse_given
from trainer.errors import ConfigError, TrainerError
from trainer.main import on_ranks, train
from trainer.problems import Problem
from trainer.runs.folder import report_of

if TYPE_CHECKING:
    from trainer.comm import Comm

GRID: Mapping[str, Sequence[Any]] = {"optim.lr": (0.001, 0.002), "optim.ids_lr": (0.012, 0.02)}
"""Default grid, in all combinations: the rates that differ most by log (docs/CHOICES.md)."""
_CHOSEN = ("run.resume", "run.overwrite", "train.early_stopping", "train.eval_every")
"""Settings that each run of the grid has its own of."""
NAME = "tune"
TABLE_FILE, SETTINGS_FILE = "tune.json", "settings.yaml"
_METRICS = {"gauc": "GAUC", "auc": "AUC", "logloss": "log loss"}
EXAMPLES = """Examples:
  crossmedia tune --config data/samples/settings.yaml
  horovodrun -np 8 crossmedia tune --epochs 8 --set run.name=tune-images
  crossmedia tune --grid optim.ids_lr=[0.003,0.006,0.02] --grid model.dropout=[0,0.2]
  crossmedia tune --set data.validation_days=3 --set model.base=dcn

Each point of the grid is one run below RUN.DIR/RUN.NAME (data/runs/tune), which holds out a tenth of the training
days, one at least, or those of data.validation_days, and stops after the first epoch that is no better there. tune.json
has all figures, and settings.yaml the best point with its number of epochs, to train on all days with. One seed
decides: a difference of .002 may be chance, and one of .02 on some hundred impressions. Start it again after a kill,
or with a larger grid or --epochs: finished runs are not made again. Exit codes are those of crossmedia train.
"""

app = commandline.CommandApp(rich_markup_mode="markdown")


@dataclass(frozen=True)
class Trial:
    """A point of the grid: its values by setting, the user's settings with them, and those of its run."""

    values: Mapping[str, Any]
    chosen: Config
    held_out: Config

    @property
    def folder(self) -> RunPath:
        return run_path(self.held_out.run.dir) / str(self.held_out.run.name)

    def row(self) -> dict[str, Any]:
        """Return values and figures of the finished run: of its best epoch, with which it has ended."""
        report = report_of(self.folder) or {}
        history = report["history"]
        epoch = 1 + [entry["step"] for entry in history].index(report["global_step"])
        figures = {name: history[epoch - 1][name] for name in (*_METRICS, "impressions")}
        return {"values": dict(self.values), "epoch": epoch, **figures, "run": str(self.folder)}


@app.command(epilog=EXAMPLES)
def main(
    file: SettingsFile = None,
    settings: Settings = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SECTION.FIELD=[VALUES]",
            help="Values to try of a setting, in place of the default grid; may be repeated.",
            show_default=" ".join(f"{name}=[{','.join(map(str, values))}]" for name, values in GRID.items()),
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of a run at most.")] = 4,
    more: MoreSettings = None,
) -> None:
    """Find the rates and the number of epochs on the last training days, and write them as a file of settings."""
    given = [*(settings or []), *(more or [])]
    trials: list[Trial] = []

    def load() -> Config:
        trials[:] = trials_of(file, given, parsed_grid(grid or []), epochs)
        return trials[0].held_out

    raise typer.Exit(on_ranks(load, lambda _, comm: tune(trials, comm)))


def parsed_grid(texts: Sequence[str]) -> Mapping[str, Sequence[Any]]:
    """Read settings with their values; without any, `GRID`. Raises ConfigError."""
    found: dict[str, Sequence[Any]] = {}
    for text in texts:
        name, _, written = text.partition("=")
        try:
            values = parse_yaml(written)
        except ValueError:
            values = None
        if not isinstance(values, list) or not values:
            raise ConfigError(Problem.NOT_A_GRID, text)
        found[name] = values
    return found or GRID


def trials_of(
    file: RunPath | None, given: Sequence[str], grid: Mapping[str, Sequence[Any]], epochs: int
) -> list[Trial]:
    """Make the settings of all points of the grid. Raises ConfigError."""
    base = load_config(file, given)
    refuse_given(base, _CHOSEN, "tune chooses it for each run")
    root = run_path(base.run.dir) / (base.run.name or NAME)
    return [_trial(file, given, values, root, epochs) for values in points(grid)]


def points(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Yield all combinations of values, by name."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _trial(file: RunPath | None, given: Sequence[str], values: Mapping[str, Any], root: RunPath, epochs: int) -> Trial:
    chosen = load_config(file, [*given, *(f"{name}={json.dumps(value)}" for name, value in values.items())])
    words = ",".join(f"{name}={value}" for name, value in values.items())
    held_out = chosen.changed(
        data={"validation_days": chosen.data.validation_days or None, "test_days": []},
        train={"epochs": epochs, "eval_every": None, "early_stopping": 1, "keep_checkpoints": 1},
        optim={"plateau_gamma": 1.0},  # as in the training on all days, which has no evaluation to go by
        run={"dir": str(root), "name": re.sub(r"[^A-Za-z0-9._]+", "-", words).strip("-"), "resume": "auto"},
    )
    return Trial(values, chosen, held_out)


def tune(trials: Sequence[Trial], comm: "Comm") -> None:
    """Train the missing runs; write and print the table and the settings of the best. Every rank calls it.

    Raises TrainerError and FeatureStoreError, on all ranks together.
    """
    console = output.text_console(quiet=comm.rank != 0)
    for number, trial in enumerate(trials, 1):
        values = " ".join(f"{name}={value}" for name, value in trial.values.items())
        console.print(f"{number} of {len(trials)}: {values}", style="bold")
        train(trial.held_out, comm, advises=False)
    comm.on_rank_0(lambda: _end(trials))


def _end(trials: Sequence[Trial]) -> None:
    rows = [trial.row() for trial in trials]
    best = max(range(len(rows)), key=lambda number: rows[number]["gauc"])
    folder = trials[0].folder.parent
    try:
        write_json_file(folder / TABLE_FILE, rows)
        write_file(folder / SETTINGS_FILE, format_yaml(best_settings(trials[best], rows[best]["epoch"])))
    except (OSError, StorageError) as failure:
        raise TrainerError(Problem.REFUSED, "write", folder / TABLE_FILE, failure) from failure
    _show(rows, best, folder)


def best_settings(trial: Trial, epochs: int) -> dict[str, dict[str, Any]]:
    """Return the settings tried and other changed ones, by section and without `run`, to train on all days."""
    chosen = trial.chosen.changed(data={"validation_days": 0}, train={"epochs": epochs}).model_dump(mode="json")
    names = [
        "train.epochs",
        *trial.values,
        *(name for name, _, _ in differing(chosen, Config().model_dump(mode="json"))),
    ]
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        section, setting = name.split(".")[:2]
        if section != "run":
            found.setdefault(section, {})[setting] = chosen[section][setting]
    return found


def _show(rows: Sequence[Mapping[str, Any]], best: int, folder: RunPath) -> None:
    console, names = output.text_console(), [*rows[0]["values"], "epoch", *_METRICS.values()]
    title = f"{folder}: the best epoch of each on {rows[0]['impressions']:,} impressions held out"
    output.print_line(console, title, style="bold")
    lines = [
        [*map(str, [*row["values"].values(), row["epoch"]]), *(f"{row[name]:.4f}" for name in _METRICS)] for row in rows
    ]
    output.print_rows(names, lines, numbers=names, bold=best)
    console.print(
        f"written to {folder / TABLE_FILE}; train on all days with the best:\n"
        f"$ crossmedia train --config {folder / SETTINGS_FILE}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    commandline.run_app(app)
