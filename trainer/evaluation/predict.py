"""Predictions of a run on its evaluation rows, with one rank or all.

Columns of a file of scores:

- user and ad: the schema's `group` and `new_ad_field` as the samples have them, text where one of the files has text;
  of crossed columns a JSON list. time: seconds since 1970, null where the samples have no column `time`. label.
- logit, and probability = 1 / (1 + exp(-logit)).
- file, row, place: the sample file below the samples' folder, the sample group in it, the impression in the group, all
  from 0.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from featurestore.console.output import print_line, text_console
from featurestore.errors import naming
from featurestore.published.channels import VersionName
from featurestore.published.paths import RunPath, run_path
from trainer.comm import Comm, SoloComm
from trainer.errors import DataError, TrainerError
from trainer.evaluation import report
from trainer.evaluation.bootstrap import Figures, Float, Metrics, measure
from trainer.evaluation.report import draw_all, measure_all
from trainer.evaluation.slices import (
    Impressions,
    Slicing,
    ad_image_field,
    places,
    read_impressions,
    seconds_of,
    seen_in_training,
    slicings,
)
from trainer.files import output_at
from trainer.runs.export import parquet_file
from trainer.runs.saved import EvaluatedRun, RunSource, open_source, read_run
from trainer.samples.columns import Index, decode, rules_of, source_columns, texts_of
from trainer.samples.index import RowGroup, SampleIndex, known_ads, read_row_group
from trainer.samples.reader import Batch
from trainer.samples.rows import sample_groups
from trainer.schema import Schema
from trainer.stages import ReadAhead


@dataclass(frozen=True)
class Predictions:
    """Logits and further columns of N impressions, in the order of the sample files."""

    logit_N: Float
    impressions: Impressions
    notes: tuple[str, ...] = ()
    """Notes for the user on the results."""
    is_new_ad_N: NDArray[np.bool_] | None = None
    """Whether the ad is not in the run's training samples; None if unknown."""


def predict_run(
    folder: RunPath | str,
    comm: Comm | None = None,
    *,
    checkpoint: str | None = None,
    samples: str | None = None,
    store: str | None = None,
    store_version: VersionName | None = None,
) -> Predictions:
    """Predict by the run in `folder` for its test samples, or for those of `samples`; see `open_source`.

    One rank where no `comm` is given, else on all of its ranks, the same on each.
    """
    comm = comm or SoloComm()
    source = RunSource(run_path(folder), checkpoint, samples, store, store_version)
    with contextlib.closing(open_source(source, comm)) as opened:
        impressions = read_impressions(comm, opened.test, opened.schema)
        logit_N = predict(opened)
        missing = opened.saved.notes_on_missing(opened.missing_lookups())
        is_new_ad_N = ~places(known_ads(comm, opened.train, opened.schema), impressions.ad_N)[1]
        return Predictions(logit_N, impressions, (*opened.notes, *missing), is_new_ad_N)


def predict(opened: EvaluatedRun) -> Float:
    """Predict logits of all test impressions (N,), the same on every rank; all call it. Raises TrainerError."""
    engine = opened.engine
    with contextlib.closing(ReadAhead(opened.reader.batches())) as ahead:
        own = np.concatenate([np.empty(0), *(engine.predict(each) for each in engine.prepared(ahead, "eval"))])
    logit_N: Float = opened.comm.allgather(torch.from_numpy(own), "logits").numpy()
    if len(logit_N) != opened.test.num_samples or not np.isfinite(logit_N).all():
        raise TrainerError("the model's predictions are not finite numbers; try an earlier checkpoint")
    return logit_N


def measure_test(opened: EvaluatedRun) -> Metrics:
    """Measure all test impressions as `evaluate`, the same on every rank; all call it. Raises TrainerError."""
    with contextlib.closing(ReadAhead(opened.reader.batches())) as ahead:
        predicted = ((each.batch, opened.engine.predict(each)) for each in opened.engine.prepared(ahead, "eval"))
        known = known_ads(opened.comm, opened.train, opened.schema)
        return evaluate(opened.comm, predicted, known, opened.schema.new_ad_field)


def has_feature(opened: EvaluatedRun, store: str, key_I: NDArray[np.int64]) -> NDArray[np.bool_] | None:
    """Find which keys have a feature in the store that a field names, (I,); None where the model does not read it."""
    service = opened.engine.services.get(store)
    if service is None:
        return None
    held_I = torch.from_numpy(service.partition.contains(key_I).astype(np.int64))
    found: NDArray[np.bool_] = opened.comm.allreduce_sum_(held_I, "has_feature").numpy() > 0
    return found


def evaluate(comm: Comm, predicted: Iterable[tuple[Batch, Float]], known_ads: Index, new_ad_field: str) -> Metrics:
    """Measure all test impressions, and under `new_ad_…` those whose ad is in no training sample.

    `predicted`: this rank's batches, each with its logits. `known_ads`: sorted values of `new_ad_field` in training.
    Every rank predicts its part and calls this, rank 0 measures the whole. Raises TrainerError where a prediction is
    not finite.
    """
    parts = []
    for batch, logit_B in predicted:
        is_new_B = ~places(known_ads, batch.fields[new_ad_field].values_N)[1]
        parts.append((logit_B, batch.label_B, batch.group_id_B, is_new_B))
    logit_N, label_N, user_N, new_N = (np.concatenate(column) for column in zip(*parts, strict=True))
    real_N2 = comm.allgather(
        torch.from_numpy(np.stack([logit_N.astype(np.float64), label_N], axis=1)), "scores"
    ).numpy()
    whole_N2 = comm.allgather(torch.from_numpy(np.stack([user_N, new_N.astype(np.int64)], axis=1)), "users").numpy()
    if not np.isfinite(real_N2).all():
        raise TrainerError("the model's predictions are not finite numbers; try a lower optim.lr")
    metrics: Metrics = {}
    if comm.rank == 0:
        for prefix, chosen in {"": slice(None), "new_ad_": whole_N2[:, 1] == 1}.items():
            metrics |= measure(real_N2[chosen, 0], real_N2[chosen, 1], whole_N2[chosen, 0], prefix)
    return comm.broadcast_object(metrics)


def evaluate_run(
    source: RunSource,
    comm: Comm,
    *,
    resamples: int = 1000,
    out: RunPath | None = None,
    json_file: Path | None = None,
    quiet: bool = False,
) -> Figures | None:
    """Evaluate a run and write the report; every rank calls it, rank 0 measures, writes and returns the figures.

    The report goes to `out`, by default RUN/evaluation, and to `json_file`; unless `quiet` it is printed. Raises
    TrainerError or FeatureStoreError.
    """
    console = text_console(quiet=quiet or comm.rank != 0)
    with contextlib.closing(open_source(source, comm)) as opened:
        count = f"{opened.test.num_samples:,} impressions, {comm.size} rank{'s' * (comm.size > 1)}"
        print_line(console, f"{opened.saved.checkpoint}: {count}")
        impressions = read_impressions(comm, opened.test, opened.schema)
        cuts = _slicings(opened, impressions)
        logit_N = predict(opened)
        about = report.about(opened, resamples)
    if comm.rank != 0:
        return None
    figures = measure_all(logit_N, impressions, cuts, resamples)
    out = out or source.folder / "evaluation"
    report.write_report(out, "report.json", {**about, **asdict(figures)}, json_file, draw_all(figures))
    report.show(console, about, figures, out)
    return figures


def _slicings(opened: EvaluatedRun, impressions: Impressions) -> list[Slicing]:
    schema, comm = opened.schema, opened.comm
    seen = seen_in_training(comm, opened.train, schema, impressions)
    image = ad_image_field(schema)
    return slicings(impressions, seen, has_feature(opened, image.store_name, seen.image_I) if image else None)


SCORES_OF = "scores"
"""Name of the metadata with the origin of the scores."""


@dataclass(frozen=True)
class Written:
    """Summary of a file of scores: its origin, its rows, and the means of labels and probabilities."""

    about: Mapping[str, Any]
    impressions: int
    mean_label: float
    mean_probability: float
    notes: tuple[str, ...] = ()


def score_run(source: RunSource, out: str, comm: Comm) -> Written | None:
    """Score the test impressions of a run, or of other samples, into the file `out`; every rank calls it.

    Rows and their order are the same at any number of ranks, logits up to the rounding of float32. Rank 0 writes, and
    returns what it has written. Raises TrainerError, FeatureStoreError.
    """
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(contextlib.closing(open_source(source, comm)))
        about = {
            **opened.saved.named(),
            "samples": opened.test.storage.url,
            "missing": opened.config.data.missing,
            "stores": {name: record.model_dump() for name, record in opened.stores.items()},
        }
        file: ScoreFile | None = None
        with comm.agreed():  # fails before the work if the address cannot be written
            if comm.rank == 0:
                file = stack.enter_context(open_scores(out, opened.test, opened.schema, about))
        logit_N = predict(opened)
        notes = opened.saved.notes_on_missing(opened.missing_lookups())
        if file is None:
            return None
        start = 0
        for row_group in opened.test.row_groups:
            file.add(row_group, logit_N[start : start + row_group.num_samples])
            start += row_group.num_samples
        return file.written((*opened.notes, *notes))


def score_rows(source: RunSource, rows: pa.Table) -> list[Float]:
    """Score rows that are in memory by a run, on this rank alone: the logits of each, see `sample_groups`.

    The samples of `source` do not count. Raises TrainerError, FeatureStoreError.
    """
    groups = sample_groups(rows, read_run(source.folder, source.checkpoint).schema)
    if not len(groups):
        return []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "test")
        folder.mkdir()
        file = folder / "rows.parquet"
        pq.write_table(groups, file)
        with naming(str(file), "the table"):
            predictions = predict_run(
                source.folder,
                checkpoint=source.checkpoint,
                samples=place,
                store=source.store,
                store_version=source.store_version,
            )
    ends_G = np.cumsum([len(each) for each in groups[groups.column_names[-1]]])
    return np.split(predictions.logit_N, ends_G[:-1])


class ScoreFile:
    """A file of scores that is being written; see `open_scores`."""

    def __init__(
        self, write: Callable[[pa.Table], None], index: SampleIndex, schema: Schema, about: Mapping[str, Any]
    ) -> None:
        self._write, self._index, self._schema, self._about = write, index, schema, about
        wanted = {schema.label, schema.group, schema.new_ad_column}
        self._rules = {name: rule for name, rule in rules_of(schema).items() if name in wanted}
        self._sums = np.zeros(3)  # of impressions, labels and probabilities

    def add(self, row_group: RowGroup, logit_B: Float) -> None:
        """Write the impressions of a row group, whose logits these are; all are added in the order of the index.

        Raises DataError, SchemaError.
        """
        if not np.isfinite(logit_B).all():
            impression = int((~np.isfinite(logit_B)).argmax())
            file = self._index.storage.full(row_group.file)
            where = f"{file}, impression {impression} of the row group from row {row_group.first_row}"
            raise DataError(f"{where}: its logit is {logit_B[impression]}; correct its values, or leave it out")
        table = self._rows(row_group, logit_B.astype(np.float64))
        self._write(table)
        sums = [len(table), *(table[name].to_numpy().sum(dtype=np.float64) for name in ("label", "probability"))]
        self._sums += sums

    def written(self, notes: tuple[str, ...] = ()) -> Written:
        """Return the summary of all added rows."""
        count, labels, probabilities = self._sums.tolist()
        return Written(self._about, round(count), labels / count, probabilities / count, notes)

    def _rows(self, row_group: RowGroup, logit_B: Float) -> pa.Table:
        storage, schema = self._index.storage, self._schema
        table = read_row_group(storage, row_group, [*source_columns(self._rules), schema.time])
        full = storage.full(row_group.file)
        groups = decode(table, self._rules, schema.label, full, row_group.first_row)
        counts_G = np.diff(groups.sample_offsets)
        group_B = np.repeat(np.arange(len(counts_G)), counts_G)

        def written(column: str) -> Any:
            """Return the raw values of the samples, repeating a group's value for each of its impressions."""
            if column not in self._index.text_columns:
                return pa.array(groups.columns[column].values)
            encoded = texts_of(table, column, self._rules[column], full, row_group.first_row)
            return pa.array(encoded.texts_U, pa.string()).take(encoded.index_N)

        time_G: Any = pa.nulls(len(counts_G), pa.int64())
        if schema.time in table.column_names:
            time_G = seconds_of(table.column(schema.time), schema.time, full).combine_chunks()
        columns: dict[str, Any] = {
            "user": written(schema.group).take(group_B),
            "ad": written(schema.new_ad_column),
            "time": time_G.take(group_B),
            "label": groups.columns[schema.label].values.astype(np.int8),
            "logit": logit_B.astype(np.float32),
            "probability": (1 / (1 + np.exp(-logit_B))).astype(np.float32),
            "file": pa.array(np.full(len(group_B), row_group.file, object), pa.string()),
            "row": row_group.first_row + group_B,
            "place": (np.arange(len(group_B)) - groups.sample_offsets[group_B]).astype(np.int32),
        }
        return pa.table(columns)


@contextlib.contextmanager
def open_scores(out: str, index: SampleIndex, schema: Schema, about: Mapping[str, Any]) -> Iterator[ScoreFile]:
    """Open a file of scores of the impressions of `index`, which gets its name `out` at the end of the block.

    `about` is written into its metadata. Raises FeatureStoreError where the place refuses.
    """
    kinds: dict[str, pa.DataType] = {
        "user": _type_of(schema.group, index),
        "ad": _type_of(schema.new_ad_column, index),
        "time": pa.int64(),
        "label": pa.int8(),
        "logit": pa.float32(),
        "probability": pa.float32(),
        "file": pa.string(),
        "row": pa.int64(),
        "place": pa.int32(),
    }
    fields: list[Any] = [pa.field(name, kind, nullable=name == "time") for name, kind in kinds.items()]
    storage, name = output_at(out)
    with parquet_file(storage, name, pa.schema(fields, metadata={SCORES_OF: json.dumps(about)})) as write:
        yield ScoreFile(write, index, schema, about)


def _type_of(column: str, index: SampleIndex) -> pa.DataType:
    return pa.string() if column in index.text_columns else pa.int64()
