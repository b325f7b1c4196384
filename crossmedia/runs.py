"""Train a run, measure it, and score a log with it."""

import atexit
import functools
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crossmedia.tables import Scores, as_html, requests_of, scores_of, with_behaviors
from featurestore.published.paths import RunPath, run_path
from trainer.comm import Comm, SoloComm, connect
from trainer.config.config import Config, load_config
from trainer.evaluation.figures import Figures, Measured
from trainer.evaluation.predict import EvaluationOptions, evaluate_run, score_run
from trainer.main import train as train_run
from trainer.main import warm_settings
from trainer.runs.folder import report_of, run_or_newest
from trainer.runs.saved import RunSource, SavedRun, read_run
from trainer.samples.columns import rules_of, source_columns
from trainer.schema.fields import SETTINGS_FILE

if TYPE_CHECKING:
    import pandas as pd

Address = str | os.PathLike[str]


@functools.cache
def ranks() -> Comm:
    """Return the ranks of horovodrun or torchrun, or this process alone; they meet once in a process."""
    comm = connect()
    atexit.register(_leave, comm)
    return comm


def _leave(comm: Comm) -> None:
    comm.close()
    if comm.is_stuck:  # a collective never ends, and Python's exit would wait for it
        sys.stdout.flush()
        os._exit(1)


def train(
    samples: Address = "data/samples",
    images: str | None = None,
    *,
    store: Address | None = None,
    name: str | None = None,
    config: Address | None = None,
    settings: Mapping[str, Any] | None = None,
    warm_start: "Run | Address | None" = None,
    warm_parts: str | None = None,
) -> "Run":
    """Train as `crossmedia train`, on all ranks that horovodrun or torchrun started, and return the run on each.

    `images`: none, ad, behavior or both (model.images). `config`: a YAML file over the preset, by default the
    settings.yaml of the samples where it is there. `settings`: any others, as {"optim.lr": 0.01}; docs/SETTINGS.md has
    all. Raises TrainerError, FeatureStoreError.
    """
    file = run_path(config) if config is not None else run_path(samples) / SETTINGS_FILE
    given: dict[str, Any] = {"data.samples": str(samples)}
    given |= {} if images is None else {"model.images": images}
    given |= {} if store is None else {"data.store": str(store)}
    given |= {} if name is None else {"run.name": name}
    words = [f"{field}={_written(value)}" for field, value in (given | dict(settings or {})).items()]
    start = None if warm_start is None else str(warm_start.folder if isinstance(warm_start, Run) else warm_start)
    comm = ranks()
    loaded = comm.on_all(
        lambda: load_config(
            file if config is not None or file.is_file() else None, [*words, *warm_settings(start, warm_parts)]
        )
    )
    return Run(train_run(loaded, comm))


def open_run(folder: Address | None = None, checkpoint: str | None = None) -> "Run":
    """Open a trained run, by default the newest in data/runs. Raises ConfigError, CheckpointError."""
    run = Run(run_or_newest(None if folder is None else str(folder)), checkpoint)
    run.saved()
    return run


class Run:
    """A trained run, with its newest checkpoint or another."""

    def __init__(self, folder: RunPath, checkpoint: str | None = None) -> None:
        self.folder, self.checkpoint = folder, checkpoint

    def saved(self) -> SavedRun:
        """Read the run's settings and checkpoint as its folder has them."""
        return read_run(self.folder, self.checkpoint)

    @property
    def config(self) -> Config:
        """The settings of the run."""
        return self.saved().config

    @property
    def report(self) -> dict[str, Any]:
        """The report of the training; empty before its end."""
        return report_of(self.folder) or {}

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics on the test samples at the end of the training."""
        metrics: dict[str, Any] = self.report.get("metrics", {})
        return metrics

    def evaluate(
        self,
        samples: Address | None = None,
        store: Address | None = None,
        *,
        resamples: int = 1000,
        missing_curve: bool = False,
        out: Address | None = None,
    ) -> "Evaluation":
        """Evaluate as `crossmedia evaluate`, on all ranks, and write the report. Raises TrainerError."""
        source = RunSource(self.folder, self.checkpoint, _text(samples), _text(store))
        to = None if out is None else run_path(out)
        figures = evaluate_run(source, EvaluationOptions(resamples, missing_curve, to), ranks())
        return Evaluation(ranks().broadcast_object(figures))

    def score(self, rows: Any, behaviors: Any = None, *, store: Address | None = None) -> Scores:
        """Score rows on this rank: logit and probability of each, as `crossmedia score` computes them.

        `rows` have the columns of the samples, an impression each or, with lists of ads, a group each; or they are a
        raw log of impressions, and `behaviors` one of behaviours (`with_behaviors`). Labels may be left out. Features
        are those of the training, or of the newest snapshot of `store`. Raises TrainerError, FeatureStoreError.
        """
        saved = self.saved()
        if behaviors is not None:
            rows = with_behaviors(rows, behaviors, saved.config.data.samples)
        rules, label = source_columns(rules_of(saved.schema)), saved.schema.label
        table, _ = requests_of(rows, {name: rule.depth for name, rule in rules.items() if name != label})
        ads: Any = table.column(next(name for name in table.column_names if rules[name].side == "ad")).combine_chunks()
        counts = pa.array(np.concatenate([[0], np.cumsum(ads.value_lengths().to_numpy())]), pa.int32())
        labels = pa.ListArray.from_arrays(counts, pa.array(np.zeros(counts[-1].as_py(), np.int8)))
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place, "test")
            folder.mkdir()
            pq.write_table(table.append_column(label, labels), folder / "rows.parquet")
            source = RunSource(self.folder, self.checkpoint, place, _text(store))
            score_run(source, f"{place}/scores.parquet", SoloComm())
            logit_B = pq.read_table(f"{place}/scores.parquet", columns=["logit"])["logit"].to_numpy()
        return scores_of(rows, np.split(logit_B, counts.to_numpy()[1:-1]))

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value:.4f}" for name, value in self._shown().items())
        return f"Run({str(self.folder)!r}{', ' if shown else ''}{shown})"

    def _repr_html_(self) -> str:
        return as_html(str(self.folder), {name: f"{value:.4f}" for name, value in self._shown().items()})

    def _shown(self) -> dict[str, float]:
        return {name: value for name, value in self.metrics.items() if isinstance(value, float)}


class Evaluation:
    """The figures of an evaluation: a row for all impressions, and one for each slice."""

    def __init__(self, figures: Figures) -> None:
        self.figures = figures

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The table as dicts; `low` and `high` are the ends of the 95 % interval of a metric."""
        rows = [{"slicing": "", "slice": "all", **_row(self.figures.whole)}]
        for sliced in self.figures.sliced_by.values():
            rows += [{"slicing": sliced.title, "slice": name, **_row(each)} for name, each in sliced.slices.items()]
        return rows

    @property
    def table(self) -> "pd.DataFrame":
        """The table as a DataFrame of pandas."""
        import pandas as pd

        return pd.DataFrame(self.rows).set_index(["slicing", "slice"])

    def as_dict(self) -> dict[str, Any]:
        """Return all figures, as report.json has them."""
        return asdict(self.figures)

    def __repr__(self) -> str:
        whole = self.figures.whole
        return f"Evaluation({whole.impressions:,} impressions, {len(self.rows) - 1} slices)"

    def _repr_html_(self) -> str:
        return str(self.table.to_html(float_format="{:.4f}".format))


def _row(measured: Measured) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(measured, name) for name in ("impressions", "users", "clicks")}
    for name, estimate in measured.metrics.items():
        row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return row


def _written(value: Any) -> str:
    """Write a value as a setting on the command line, which is YAML."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _text(address: Address | None) -> str | None:
    return None if address is None else str(address)
