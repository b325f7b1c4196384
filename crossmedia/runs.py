"""Train a run, measure it, and score a log with it."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa

from featurestore.published.paths import RunPath, run_path
from featurestore.text import Shown
from pipeline.samples.requests import with_behaviors
from trainer.cli import joined_ranks
from trainer.config import Config, load_config
from trainer.evaluation.bootstrap import Evaluation, shown
from trainer.evaluation.predict import score_rows, scores_of
from trainer.evaluation.report import evaluate_run
from trainer.main import train as train_run
from trainer.runs.folder import report_of, run_or_newest
from trainer.runs.saved import RunSource, SavedRun, open_network, read_run
from trainer.schema.fields import SETTINGS_FILE
from trainer.schema.profile import table_of

if TYPE_CHECKING:
    from crossmedia.models import Model

Address = str | os.PathLike[str] | RunPath


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

    `images`: none, ad, behavior or both (model.images). `config`: a YAML file over the defaults, by default the
    settings.yaml of the samples, if any. `settings`: any of docs/SETTINGS.md. Raises TrainerError, FeatureStoreError.
    """
    settings_file = run_path(samples) / SETTINGS_FILE
    file = run_path(config) if config is not None else settings_file if settings_file.is_file() else None
    before = warm_start.folder if isinstance(warm_start, Run) else warm_start
    named = {"data.samples": samples, "model.images": images, "data.store": store, "run.name": name}
    named |= {"run.warm_start": before, "run.warm_parts": warm_parts}
    given = {field: value for field, value in named.items() if value is not None} | dict(settings or {})
    words = [f"{field}={_written(value)}" for field, value in given.items()]
    comm = joined_ranks()
    loaded = comm.on_all(lambda: load_config(file, words))
    return Run(train_run(loaded, comm))


def open_run(folder: Address | None = None, checkpoint: str | None = None) -> "Run":
    """Open a trained run, by default the newest in data/runs. Raises ConfigError, CheckpointError."""
    return Run(run_or_newest(_text(folder)), checkpoint)


class Run(Shown):
    """A trained run in a folder, with its newest checkpoint or another. Raises ConfigError, CheckpointError."""

    def __init__(self, folder: Address, checkpoint: str | None = None) -> None:
        self.folder, self.checkpoint = run_path(folder), checkpoint
        self.saved()

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
        return cast("dict[str, Any]", self.report.get("metrics", {}))

    def evaluate(
        self,
        samples: Address | None = None,
        store: Address | None = None,
        *,
        by: str | Sequence[str] = (),
        resamples: int = 1000,
        out: Address | None = None,
    ) -> Evaluation:
        """Evaluate as `crossmedia evaluate`, on all ranks, write the report and print nothing.

        `by`: columns to cut by, as "category". Raises TrainerError.
        """
        source = RunSource(self.folder, self.checkpoint, _text(samples), _text(store))
        comm, columns = joined_ranks(), [by] if isinstance(by, str) else by
        to = None if out is None else run_path(out)
        found = evaluate_run(source, comm, resamples=resamples, by=columns, out=to, quiet=True)
        _warn(found.notes if found else ())
        return comm.broadcast_object(cast("Evaluation", found))

    def score(self, rows: Any, behaviors: Any = None, *, store: Address | None = None) -> Any:
        """Score rows on this rank: logit and probability of each, as `crossmedia score` computes them.

        `rows` have the columns of the samples, an impression each or, with lists of ads, a group each; or they are a
        raw log of impressions, and `behaviors` one of behaviours (`with_behaviors`). Labels may be left out. Features
        are of the training, or of the newest snapshot of `store`. Warns where images lack them, and the model has
        never met that. Raises TrainerError, FeatureStoreError.
        """
        if not (table := table_of(rows)).num_rows:
            return scores_of(rows, [])
        if behaviors is not None:
            table = with_behaviors(table, behaviors, self.config.data.samples)
        logits, notes = score_rows(RunSource(self.folder, self.checkpoint, store=_text(store)), table)
        _warn(notes)
        return scores_of(rows, logits)

    def vectors(self, network: str | None = None) -> pa.Table:
        """Compute the visual vectors of all images of the store's newest snapshot: key, uri, vector (V,).

        `network`: which E, where the run has several. Raises TrainerError, FeatureStoreError.
        """
        return pa.concat_tables(open_network(self.folder, which=self.checkpoint, network=network).tables())

    def publish(self, url: Address = "data/models/ctr", *, gate: bool = True) -> "Model":
        """Publish as `crossmedia publish` the next version of the model at `url`, and open it.

        It is put in use, with `gate` only if it is not worse than the one in use. Raises ServingError, TrainerError.
        """
        from crossmedia.models import load_model
        from jobs.export_model import put_in_use
        from serving.bundle.export import ExportOptions, export_model, write_network

        options = ExportOptions(run=self.folder, checkpoint=self.checkpoint, use=not gate)
        made = export_model(str(url), options, network=write_network).manifest
        if gate:
            put_in_use(str(url), made, options)
        return load_model(str(url), made.version)

    def _about(self) -> tuple[str, dict[str, Any]]:
        given = {name: shown(self.metrics, name) for name in self.metrics}
        return str(self.folder), {name: value for name, value in given.items() if isinstance(value, float)}


def _warn(notes: Sequence[str]) -> None:
    for note in notes:  # which the caller of a method of Run should know of its figures or scores
        warnings.warn(note, stacklevel=3)


def _written(value: Any) -> str:
    """Write a value as a setting on the command line, which is YAML."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _text(address: Address | None) -> str | None:
    return None if address is None else str(address)
