"""Scores as a Parquet file: a row for each impression, in the order of the sample files, with what joins it back.

Its columns:

- user and ad: the schema's `group` and `new_ad_field` as the samples have them, text where one of the files has text;
  of crossed columns a JSON list. time: seconds since 1970, null where the samples have no column `time`. label.
- logit, and probability = 1 / (1 + exp(-logit)).
- file, row, place: the sample file below the samples' folder, the sample group in it, the impression in the group, all
  from 0.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.comm import Comm
from trainer.errors import DataError
from trainer.evaluation.bootstrap import Float
from trainer.evaluation.impressions import seconds_of
from trainer.evaluation.predict import predict
from trainer.files import output_at
from trainer.runs.export import parquet_file
from trainer.runs.saved import RunSource, open_source
from trainer.samples.columns import decode, rules_of, source_columns, texts_of
from trainer.samples.reader import RowGroup, SampleIndex, read_row_group
from trainer.schema import Schema

SCORES_OF = "scores"
"""Name of the metadata that say what the scores are of."""


@dataclass(frozen=True)
class Written:
    """What a file of scores has: what it is of, its rows, and the means of labels and of probabilities."""

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
            "missing": opened.run.config.data.missing,
            "stores": {name: record.model_dump() for name, record in opened.run.stores.items()},
        }
        file: ScoreFile | None = None
        with comm.agreed():  # a place that cannot be written is found before the work
            if comm.rank == 0:
                file = stack.enter_context(open_scores(out, opened.test, opened.run.schema, about))
        logit_N = predict(opened)
        notes = opened.saved.notes_on_missing(opened.run.missing_lookups())
        if file is None:
            return None
        start = 0
        for row_group in opened.test.row_groups:
            file.add(row_group, logit_N[start : start + row_group.num_samples])
            start += row_group.num_samples
        return file.written((*opened.notes, *notes))


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
        """Sum up what has been added."""
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
            """Give the values as the samples have them: a group's own value once, an ad's in each place."""
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
