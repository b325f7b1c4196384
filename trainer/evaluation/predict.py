"""Predictions of a run on its evaluation rows, with one rank or all, and the slices that these rows fall into.

Columns of a file of scores:

- user and ad: the schema's `group` and `new_ad_field` as the logs have them: text where one of the files of samples has
  text, or where a dictionary has texts of their IDs; of crossed columns a JSON list. time: seconds since 1970, null
  where the samples have no column `time`. label.
- logit, and probability = 1 / (1 + exp(-logit)).
- file, row, place: the sample file below the samples' folder, the sample group in it, the impression in the group, all
  from 0.

Letters of shapes: N test impressions, A distinct ads and I distinct ad images among them. What training saw is counted
for those alone, in one pass over the training samples, each rank over its share. S slices of a slicing.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from featurestore.errors import naming
from featurestore.keys import BoolArray, Float32Array, Float64Array, Int64Array
from featurestore.published.paths import RunPath, run_path
from featurestore.published.versions import VersionName
from trainer.comm import Comm, SoloComm
from trainer.errors import SchemaError, TrainerError
from trainer.evaluation.bootstrap import Metrics, measure, probability
from trainer.problems import Problem
from trainer.runs.open import test_reader
from trainer.runs.saved import (
    EvaluatedRun,
    PredictingRun,
    RunSource,
    open_predicting,
    open_source,
    parquet_file,
    read_run,
)
from trainer.samples import columns
from trainer.samples.index import RowGroup, SampleIndex, known_ads, read_row_group, read_values
from trainer.samples.reader import Batch
from trainer.samples.survey import IdDictionary, texts_of_ids
from trainer.schema.fields import Field, Schema
from trainer.schema.profile import is_pandas
from trainer.stages import ReadAhead


@dataclass(frozen=True)
class Impressions:
    """N test impressions; columns that the schema lacks, or that nobody has asked for, are None."""

    label_N: Float32Array
    user_N: Int64Array
    ad_N: Int64Array
    """The schema's `new_ad_field`."""
    image_N: Int64Array | None = None
    """Key of the ad image: the first content field of side ad."""
    history_N: Int64Array | None = None
    """Behaviours of the user: values of the first content field of side user, else of the first list of IDs."""
    by: Mapping[str, Int64Array] = field(default_factory=dict)
    """Further columns to cut by, as they were asked for."""


@dataclass(frozen=True)
class SeenInTraining:
    """Impressions of ads `ad_A` in the training, and whether it met images `image_I`, shown or in a history."""

    ad_A: Int64Array
    impressions_A: Int64Array
    image_I: Int64Array
    met_I: BoolArray


def gathered(
    comm: Comm, predicted: Iterable[tuple[Batch, Float64Array]], schema: Schema, by: Sequence[str] | None = None
) -> tuple[Float64Array, Impressions]:
    """Gather logits (N,) and their impressions from rank to rank, the same on every rank.

    `predicted`: this rank's batches, each with its logits. `by`: fields to cut by besides images and histories, see
    `fields_by`; None: nothing is cut. Raises SchemaError, and TrainerError where a logit is not finite.
    """
    image, history = (None, None) if by is None else (ad_image_field(schema), _history_field(schema))
    further = fields_by(schema, by or ())
    names = ["user", "ad", *(["image"] if image else []), *(["history"] if history else [])]
    names += [f"by {name}" for name in further]
    real, whole = [np.empty((0, 2))], [np.empty((0, len(names)), np.int64)]
    for batch, logit_B in predicted:
        columns_B = [batch.group_id_B, batch.fields[schema.new_ad_field].values_N]
        columns_B += [batch.fields[image.name].values_N] if image else []
        columns_B += [batch.fields[history.name].lengths_M[batch.group_of_sample_B]] if history else []
        for each in further.values():
            values_M = batch.fields[each.name].values_N
            columns_B.append(values_M[batch.group_of_sample_B] if each.side == "user" else values_M)
        real.append(np.stack([logit_B.astype(np.float64), batch.label_B], axis=1))
        whole.append(np.stack(columns_B, axis=1).astype(np.int64))
    real_N2 = comm.allgather(torch.from_numpy(np.concatenate(real)), "scores").numpy()
    whole_KN = comm.allgather(torch.from_numpy(np.concatenate(whole)), "impressions").numpy().T.copy()
    if not np.isfinite(real_N2).all():
        raise TrainerError(Problem.LOGITS_NOT_FINITE)
    found = dict(zip(names, whole_KN, strict=True))
    return real_N2[:, 0].copy(), Impressions(
        label_N=real_N2[:, 1].astype(np.float32),
        user_N=found["user"],
        ad_N=found["ad"],
        image_N=found.get("image"),
        history_N=found.get("history"),
        by={name: found[f"by {name}"] for name in further},
    )


def fields_by(schema: Schema, names: Sequence[str]) -> dict[str, Field]:
    """Find the fields to cut by: with one id a row, by their name or column, also without `ad_` or `user_` before it.

    Raises SchemaError.
    """
    single = [field for field in schema.fields if field.kind == "id" and not (field.buckets or field.boundaries)]
    known = {name: field for field in reversed(single) for name in (field.column_name, field.name)}
    found = {name: known.get(name) or known.get(f"ad_{name}") or known.get(f"user_{name}") for name in names}
    if unknown := [name for name, field in found.items() if field is None]:
        there = ", ".join(field.name for field in single)
        raise SchemaError(Problem.BY_UNKNOWN_FIELD, unknown[0], there)
    return {name: field for name, field in found.items() if field is not None}


def seen_in_training(comm: Comm, index: SampleIndex, schema: Schema, impressions: Impressions) -> SeenInTraining:
    """Count the ads and ad images of `impressions` in the split `index`; the same on every rank.

    Raises DataError or SchemaError on all ranks together.
    """
    ad_A, image = np.unique(impressions.ad_N), ad_image_field(schema)
    image_I = np.unique(impressions.image_N) if impressions.image_N is not None else np.empty(0, np.int64)
    shown_A, met_I = np.zeros(len(ad_A), np.int64), np.zeros(len(image_I), np.int64)
    of_store = {f.column_name for f in schema.of_kind("content") if image and f.store_name == image.store_name}
    rules = columns.rules_of(schema)
    wanted = {name: rules[name] for name in {schema.new_ad_column, *of_store}}
    with comm.agreed():
        for values in read_values(index, index.row_groups[comm.rank :: comm.size], wanted):
            at_N, is_in_N = places(ad_A, values[schema.new_ad_column])
            shown_A += np.bincount(at_N[is_in_N], minlength=len(ad_A))
            for column in of_store:
                at_K, is_in_K = places(image_I, values[column])
                met_I[at_K[is_in_K]] = 1
    total = comm.allreduce_sum_(torch.from_numpy(np.concatenate([shown_A, met_I])), "seen").numpy()
    return SeenInTraining(ad_A, total[: len(ad_A)], image_I, total[len(ad_A) :] > 0)


def ad_image_field(schema: Schema) -> Field | None:
    """Find the field whose keys are the ads' images, one each; None where the schema has none."""
    return next(schema.of_kind("content", side="ad"), None)


def _history_field(schema: Schema) -> Field | None:
    contents = schema.of_kind("content", side="user")
    return next(contents, None) or next(schema.of_kind("multi_id", side="user"), None)


def places(sorted_A: Int64Array, values_N: Int64Array) -> tuple[Int64Array, BoolArray]:
    """Find where each value is in `sorted_A`, and whether it is."""
    if len(sorted_A) == 0:
        return np.zeros(len(values_N), np.int64), np.zeros(len(values_N), np.bool_)
    at_N = np.minimum(np.searchsorted(sorted_A, values_N), len(sorted_A) - 1)
    return at_N, sorted_A[at_N] == values_N


def seconds_of(column: Any, name: str, file: str) -> Any:
    """Compute whole seconds since 1970 as int64. Raises SchemaError for a column of another kind."""
    if pa.types.is_timestamp(column.type):
        return pc.floor_temporal(column, unit="second").cast(pa.timestamp("s", tz=column.type.tz)).cast(pa.int64())
    if pa.types.is_integer(column.type) and column.type != pa.uint64():
        return column.cast(pa.int64())
    raise SchemaError(Problem.NOT_A_TIME, file, name, column.type)


AD_IMPRESSIONS = (1, 10, 30, 100, 300, 1000)
HISTORY = (1, 6, 11, 21, 51)
NO_ID = -1
"""Id in the samples of a row whose log has none."""
MOST_VALUES = 20
"""Most values of a column to slice by: the values with most impressions."""


@dataclass(frozen=True)
class Slicing:
    """One way to cut: impression n is in the slice `names[slice_N[n]]`; some slices may be empty."""

    name: str
    title: str
    names: tuple[str, ...]
    slice_N: Int64Array


def slicings(impressions: Impressions, seen: SeenInTraining, has_feature_I: BoolArray | None) -> list[Slicing]:
    """Cut by impressions of the ad in training, history length, and image: those that the schema has.

    `has_feature_I`: which of `seen.image_I` have one; None where the model reads no store.
    """
    shown_N = seen.impressions_A[np.searchsorted(seen.ad_A, impressions.ad_N)]
    found = [_ranges("ad_impressions", "impressions of the ad in training", shown_N, AD_IMPRESSIONS)]
    if impressions.history_N is not None:
        found.append(_ranges("history", "length of the user's history", impressions.history_N, HISTORY))
    if impressions.image_N is not None:
        image_N = np.searchsorted(seen.image_I, impressions.image_N)
        slice_N = np.where(seen.met_I[image_N], 0, 1)
        if has_feature_I is not None:
            slice_N = np.where(has_feature_I[image_N], slice_N, 2)
        found.append(Slicing("image", "image of the ad", ("known", "new", "missing"), slice_N))
    return found


def slicings_by(impressions: Impressions, texts: Mapping[int, str]) -> list[Slicing]:
    """Cut by the values of further columns, those of most impressions first; the others are together.

    `texts`: of ids that are hashes.
    """
    found = []
    for name, values_N in impressions.by.items():
        values_U, place_N, counts_U = np.unique(values_N, return_inverse=True, return_counts=True)
        order_U = np.lexsort([values_U, -counts_U])
        rank_U = np.empty(len(order_U), np.int64)
        rank_U[order_U] = np.minimum(np.arange(len(order_U)), MOST_VALUES)
        most = values_U[order_U[:MOST_VALUES]].tolist()
        shown = [texts.get(each, "(none)" if each == NO_ID else str(each)) for each in most]
        others = [f"{len(order_U) - MOST_VALUES:,} others"] if len(order_U) > MOST_VALUES else []
        found.append(Slicing(f"by {name}", name, (*shown, *others), rank_U[place_N]))
    return found


def _ranges(name: str, title: str, values_N: Int64Array, edges: Sequence[int]) -> Slicing:
    """Cut between whole `edges`, the first of which is 1: 0, 1 to 9, …, 1,000 or more."""
    ends = [following - 1 for following in edges[1:]]
    inner = [f"{low:,} to {high:,}" if low < high else f"{low:,}" for low, high in zip(edges, ends, strict=False)]
    slice_N = np.searchsorted(edges, values_N, side="right").astype(np.int64)
    return Slicing(name, title, ("0", *inner, f"{edges[-1]:,} or more"), slice_N)


@dataclass(frozen=True)
class Predictions:
    """Logits and further columns of N impressions, in the order of the sample files."""

    logit_N: Float64Array
    impressions: Impressions
    notes: tuple[str, ...] = ()
    """Notes for the user on the results."""
    is_new_ad_N: BoolArray | None = None
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
    return predict_source(RunSource(run_path(folder), checkpoint, samples, store, store_version), comm or SoloComm())


def predict_source(source: RunSource, comm: Comm) -> Predictions:
    """Predict as `predict_run`; every rank calls it."""
    with contextlib.closing(open_source(source, comm)) as opened:
        logit_N, impressions = predict(opened)
        missing = opened.saved.notes_on_missing(opened.missing_lookups())
        is_new_ad_N = ~places(known_ads(comm, opened.train, opened.schema), impressions.ad_N)[1]
        return Predictions(logit_N, impressions, (*opened.notes, *missing), is_new_ad_N)


def predict(opened: PredictingRun, by: Sequence[str] = ()) -> tuple[Float64Array, Impressions]:
    """Predict logits of all test impressions (N,), in the order of the files, with these impressions.

    The same on every rank; all call it. `by`: further fields to cut by. Raises TrainerError, SchemaError.
    """
    logit_N, impressions = gathered(opened.comm, _predicted(opened), opened.schema, by)
    assert len(logit_N) == opened.test.num_samples
    return logit_N, impressions


def _predicted(opened: PredictingRun) -> Iterator[tuple[Batch, Float64Array]]:
    reader = test_reader(opened.config, opened.comm, opened.test, opened.schema)
    with contextlib.closing(ReadAhead(reader.batches())) as ahead:
        for each in opened.engine.prepared(ahead, "eval"):
            yield each.batch, opened.engine.predict(each)


def measure_test(opened: EvaluatedRun) -> Metrics:
    """Measure all test impressions as `evaluate`, the same on every rank; all call it. Raises TrainerError."""
    known = known_ads(opened.comm, opened.train, opened.schema)
    return evaluate(opened.comm, _predicted(opened), known, opened.schema)


def slicings_of(opened: EvaluatedRun, impressions: Impressions) -> list[Slicing]:
    """Cut the test impressions of a run, see `slicings`; the same on every rank, all call it."""
    seen = seen_in_training(opened.comm, opened.train, opened.schema, impressions)
    image, has_feature_I = ad_image_field(opened.schema), None
    service = opened.engine.services.get(image.store_name) if image else None
    if service is not None:  # else the model reads no store of them
        held_I = torch.from_numpy(service.partition.contains(seen.image_I).astype(np.int64))
        has_feature_I = opened.comm.allreduce_sum_(held_I, "has_feature").numpy() > 0
    found = slicings(impressions, seen, has_feature_I)
    ids = {number for values_N in impressions.by.values() for number in np.unique(values_N).tolist()}
    texts = opened.comm.on_rank_0(lambda: opened.saved.texts_of(ids, opened.test.storage)) if ids else {}
    return found + slicings_by(impressions, texts)


def evaluate(
    comm: Comm, predicted: Iterable[tuple[Batch, Float64Array]], known_ads: Int64Array, schema: Schema
) -> Metrics:
    """Measure all test impressions, and under `new_ad_…` those whose ad is in no training sample.

    `predicted`: this rank's batches, each with its logits. `known_ads`: sorted values of `new_ad_field` in training.
    Every rank predicts its part and calls this, rank 0 measures the whole. Raises TrainerError where a prediction is
    not finite.
    """
    logit_N, found = gathered(comm, predicted, schema)
    metrics: Metrics = {}
    if comm.rank == 0:
        label_N, is_new_N = found.label_N.astype(np.float64), ~places(known_ads, found.ad_N)[1]
        for prefix, chosen in {"": np.ones_like(is_new_N), "new_ad_": is_new_N}.items():
            metrics |= measure(logit_N[chosen], label_N[chosen], found.user_N[chosen], prefix)
    return comm.broadcast_object(metrics)


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
    returns the written summary. Raises TrainerError, FeatureStoreError.
    """
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(contextlib.closing(open_predicting(source, comm)))
        about = {
            **opened.saved.named(),
            "samples": opened.test.storage.url,
            "missing": opened.config.data.missing,
            "stores": {name: record.model_dump() for name, record in opened.stores.items()},
        }
        file: ScoreFile | None = None
        with comm.agreed():  # fails before the work if the address cannot be written
            if comm.rank == 0:
                dictionaries = opened.saved.dictionaries(opened.test.storage)
                texts = written_ids(opened.test, opened.schema, dictionaries)
                file = stack.enter_context(open_scores(out, opened.test, opened.schema, about, texts))
        logit_N, _ = predict(opened)
        notes = opened.saved.notes_on_missing(opened.missing_lookups())
        if file is None:
            return None
        start = 0
        for row_group in opened.test.row_groups:
            file.add(row_group, logit_N[start : start + row_group.num_samples])
            start += row_group.num_samples
        return file.written((*opened.notes, *notes))


def score_rows(source: RunSource, rows: pa.Table) -> tuple[list[Float64Array], tuple[str, ...]]:
    """Score rows that are in memory by a run, on this rank alone: the logits of each, see `sample_groups`, and notes.

    The samples of `source` do not count. Raises TrainerError, FeatureStoreError.
    """
    groups = columns.sample_groups(rows, read_run(source.folder, source.checkpoint).schema)
    if not len(groups):
        return [], ()
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as opened:
        folder = Path(place, "test")
        folder.mkdir()
        file = folder / "rows.parquet"
        pq.write_table(groups, file)
        with naming(str(file), "the table"):
            run = opened.enter_context(contextlib.closing(open_predicting(replace(source, samples=place), SoloComm())))
            logit_N, _ = predict(run)
            notes = (*run.notes, *run.saved.notes_on_missing(run.missing_lookups()))
    ends_G = np.cumsum([len(each) for each in groups[groups.column_names[-1]]])
    return np.split(logit_N, ends_G[:-1]), notes


def scores_of(data: Any, logits: Sequence[NDArray[Any]]) -> Any:
    """Make a table of the logits and click probabilities of each row's ads.

    It is a DataFrame of pandas with its index where `data` is one, else an Arrow table.
    """
    logit_B = np.concatenate([np.empty(0, np.float32), *logits]).astype(np.float32)
    columns = {"logit": logit_B, "probability": probability(logit_B).astype(np.float32)}
    if not is_pandas(data):
        return pa.table({name: pa.array(values) for name, values in columns.items()})
    import pandas as pd

    return pd.DataFrame(columns, index=data.index.repeat([len(each) for each in logits]))


IdTexts = Mapping[str, Mapping[int, str]]
"""The texts of the IDs that are hashes, by column."""


def written_ids(index: SampleIndex, schema: Schema, dictionaries: Sequence[IdDictionary]) -> IdTexts:
    """Find the texts of users and ads in columns that have numbers in all files, one pass over these columns.

    Nothing is read where there is no dictionary. A column whose IDs have no text is left out. Raises DataError.
    """
    found: dict[str, Mapping[int, str]] = {}
    if not dictionaries:
        return found
    for column in {schema.group, schema.new_ad_column} - index.text_columns:
        ids: set[int] = set()
        for values in read_values(index, index.row_groups, {column: columns.rules_of(schema)[column]}):
            ids.update(np.unique(values[column]).tolist())
        if texts := texts_of_ids(ids, dictionaries):
            found[column] = texts
    return found


@dataclass
class ScoreFile:
    """A file of scores that is being written; see `open_scores`."""

    write: Callable[[pa.Table], None]
    index: SampleIndex
    schema: Schema
    about: Mapping[str, Any]
    texts: IdTexts
    _sums: Float64Array = field(default_factory=lambda: np.zeros(3))
    """Sums of impressions, labels and probabilities."""

    def add(self, row_group: RowGroup, logit_B: Float64Array) -> None:
        """Write the impressions of a row group, whose logits these are, finite; all are added in the index's order.

        Raises DataError, SchemaError.
        """
        table = self._rows(row_group, logit_B.astype(np.float64))
        self.write(table)
        self._sums += [len(table), *(table[each].to_numpy().sum(dtype=np.float64) for each in ("label", "probability"))]

    def written(self, notes: tuple[str, ...] = ()) -> Written:
        """Return the summary of all added rows."""
        count, labels, probabilities = self._sums.tolist()
        return Written(self.about, round(count), labels / count, probabilities / count, notes)

    def _rows(self, row_group: RowGroup, logit_B: Float64Array) -> pa.Table:
        storage, schema, full = self.index.storage, self.schema, self.index.storage.full(row_group.file)
        wanted = {schema.label, schema.group, schema.new_ad_column}
        rules = {name: rule for name, rule in columns.rules_of(schema).items() if name in wanted}
        table = read_row_group(storage, row_group, [*columns.source_columns(rules), schema.time])
        groups = columns.decode(table, rules, schema.label, full, row_group.first_row)
        counts_G = np.diff(groups.sample_offsets)
        group_B = np.repeat(np.arange(len(counts_G)), counts_G)

        def written(column: str) -> Any:
            """Return a column's values as the logs have them."""
            if texts := self.texts.get(column):
                ids = groups.columns[column].values.tolist()
                return pa.array([texts.get(each, str(each)) for each in ids], pa.string())
            if column not in self.index.text_columns:
                return pa.array(groups.columns[column].values)
            encoded = columns.texts_of(table, column, rules[column], full, row_group.first_row)
            return pa.array(encoded.texts_U, pa.string()).take(encoded.index_N)

        time_G: Any = pa.nulls(len(counts_G), pa.int64())
        if schema.time in table.column_names:
            time_G = seconds_of(table.column(schema.time), schema.time, full).combine_chunks()
        values: dict[str, Any] = {
            "user": written(schema.group).take(group_B),
            "ad": written(schema.new_ad_column),
            "time": time_G.take(group_B),
            "label": groups.columns[schema.label].values.astype(np.int8),
            "logit": logit_B.astype(np.float32),
            "probability": probability(logit_B).astype(np.float32),
            "file": pa.array(np.full(len(group_B), row_group.file, object), pa.string()),
            "row": row_group.first_row + group_B,
            "place": (np.arange(len(group_B)) - groups.sample_offsets[group_B]).astype(np.int32),
        }
        return pa.table(values)


@contextlib.contextmanager
def open_scores(
    out: str, index: SampleIndex, schema: Schema, about: Mapping[str, Any], texts: IdTexts
) -> Iterator[ScoreFile]:
    """Open a file of scores of the impressions of `index`, which gets its name `out` at the end of the block.

    `about` is written into its metadata; `texts`: see `written_ids`. Raises FeatureStoreError where the place refuses.
    """
    has_texts = index.text_columns | texts.keys()
    kinds: dict[str, pa.DataType] = {
        "user": pa.string() if schema.group in has_texts else pa.int64(),
        "ad": pa.string() if schema.new_ad_column in has_texts else pa.int64(),
        "time": pa.int64(),
        "label": pa.int8(),
        "logit": pa.float32(),
        "probability": pa.float32(),
        "file": pa.string(),
        "row": pa.int64(),
        "place": pa.int32(),
    }
    fields: list[Any] = [pa.field(name, kind, nullable=name == "time") for name, kind in kinds.items()]
    with parquet_file(out, pa.schema(fields, metadata={SCORES_OF: json.dumps(about)})) as write:
        yield ScoreFile(write, index, schema, about, texts)
