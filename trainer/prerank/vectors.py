"""Vectors of ads and users by the two towers of a run.

Either way they become sample groups with one ad each and nothing else, so the engine takes them as it takes samples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from featurestore.errors import StorageError
from featurestore.published.versions import open_published
from featurestore.storage.storage import Storage, file_at
from trainer.comm import SoloComm
from trainer.errors import ConfigError, DataError, DataNotFoundError
from trainer.exchange.vectors import FieldVectors
from trainer.models.nets import TwoTower
from trainer.prerank.artifact import IndexOrigin
from trainer.runs.saved import TrainedRun, finite
from trainer.samples.columns import (
    ColumnRows,
    DecodedGroups,
    Index,
    Rule,
    concatenate,
    decode,
    decode_unlabelled,
    rules_of,
    source_columns,
)
from trainer.samples.index import RowGroup, open_index, read_row_group, row_groups_of_table
from trainer.samples.reader import Batch, Jagged, inputs_of
from trainer.schema import CROSS, Field, Schema

_SPLITS = ("train", "test")


@dataclass(frozen=True)
class Ads:
    """Ads in memory: row n of every column belongs to ad n, whose key is `keys_N[n]`; no key comes twice."""

    keys_N: Index
    columns: Mapping[str, ColumnRows]

    def batches(self, schema: Schema, fields: Sequence[Field], size: int) -> Iterator[Batch]:
        """Divide the ads into batches without users and context: only `fields` have rows."""
        names = {field.name for field in fields}
        nothing = Jagged(np.empty(0, np.int64), np.empty(0, np.int32))
        for start in range(0, len(self.keys_N), size):
            index_B = np.arange(start, min(start + size, len(self.keys_N)))

            def taken(field: Field, column: str, index_B: Index = index_B) -> Jagged:
                return Jagged(*self.columns[column].take(index_B)) if field.name in names else nothing

            yield _batch(inputs_of(schema, taken), len(index_B))


def ads_of_table(address: str, schema: Schema, fields: Sequence[Field]) -> Ads:
    """Read the rows of a Parquet file, or of a folder of them, with the columns of `fields`: one value or list a row.

    Raises DataError for bad files and values and for a key that comes twice, SchemaError for missing columns.
    """
    storage, names = _files(address)
    rules = {
        column: replace(rule, side="user", depth=rule.depth - 1) for column, rule in _rules(schema, fields).items()
    }
    parts = [part for name in names for part in _parts(storage, name, rules)]
    if not parts:
        raise DataNotFoundError(f"--ads {address}: there is no *.parquet file with a row in it; give a table of ads")
    column = schema.new_ad_column
    columns = concatenate(parts).columns
    keys_U, count_U = np.unique(columns[column].values, return_counts=True)
    if (twice := keys_U[count_U > 1]).size:
        raise DataError(f"--ads {address}: {column}={twice[0]} is in several rows; an ad has one row")
    return Ads(columns[column].values, columns)


def ads_of_samples(samples: str, schema: Schema, fields: Sequence[Field]) -> Ads:
    """Find the distinct ads of train and test samples, with the values of their last impression.

    Last: in the order of test after train, of file names, and of rows. Raises DataError, SchemaError.
    """
    storage, column = open_published(samples), schema.new_ad_column
    splits = [split for split in _SPLITS if any(name.endswith(".parquet") for name in storage.list(split))]
    if not splits:
        raise DataNotFoundError(
            f"--samples {samples}: it has no train and no test samples; give a folder with samples, or --ads"
        )
    rules = {schema.label: Rule("ad", 1, "integer"), **_rules(schema, fields)}
    seen, parts = np.empty(0, np.int64), []
    for split in reversed(splits):
        for row_group in reversed(open_index(SoloComm(), storage, split, schema).row_groups):
            last = _last_ads(storage, row_group, rules, schema.label, column, seen)
            seen = np.union1d(seen, last.columns[column].values)
            parts.append(last)
    columns = concatenate(parts).columns
    return Ads(columns[column].values, columns)


def keys_to_remove(values: Sequence[str], column: str) -> Index:
    """Read the keys that `--remove` names: each value is a key, a Parquet file with the column, or a text file of keys.

    A text file has one key a line, after the column's name or not; empty lines count nothing. Raises DataError.
    """
    parts = [_keys_of(value, column) for value in values]
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.int64)


def _keys_of(value: str, column: str) -> Index:
    if (key := _key(value)) is not None:
        return np.array([key])
    if value.endswith(".parquet"):
        storage, names = _files(value)
        if not names:
            raise DataNotFoundError(f"--remove {value}: there is no such file")
        crossed = tuple(column.split(CROSS)) if CROSS in column else ()
        rules = {column: Rule("user", 0, "integer", text="id", crossed=crossed)}
        parts = [part for name in names for part in _parts(storage, name, rules)]
        return np.concatenate([np.empty(0, np.int64), *(part.columns[column].values for part in parts)])
    storage, name = file_at(value)
    try:
        lines = storage.read_bytes(name).decode().splitlines()
    except (FileNotFoundError, StorageError, UnicodeDecodeError) as failure:
        raise DataNotFoundError(
            f"--remove {value}: this is not a key (a whole number of 64 bits), a .parquet file or a text file"
        ) from failure
    keys = []
    for number, line in enumerate(lines, 1):
        word = line.strip().strip('"')
        if (key := _key(word)) is not None:
            keys.append(key)
        elif word and (number > 1 or word != column):
            raise DataError(
                f"--remove {value}, line {number}: {word[:40]!r} is not a key; give one whole number per line"
            )
    return np.array(keys, np.int64)


def _key(text: str) -> int | None:
    """Parse a text as an int64, or return None."""
    try:
        key = int(text)
    except ValueError:
        return None
    return key if -(2**63) <= key < 2**63 else None


def _rules(schema: Schema, fields: Sequence[Field]) -> dict[str, Rule]:
    """Of the columns of these fields and of the key, as they are in samples."""
    wanted = {field.column_name for field in fields} | {field.weights for field in fields} | {schema.new_ad_column}
    return {column: rule for column, rule in rules_of(schema).items() if column in wanted}


def _files(address: str) -> tuple[Storage, list[str]]:
    """The folder and the names in it of a Parquet file, or of all of them in a folder."""
    if not address.endswith(".parquet"):
        storage = Storage(address)
        if storage.is_local and Path(storage.url).is_file():
            raise DataNotFoundError(f"--ads {address} is neither a *.parquet file nor a folder of them")
        return storage, [each for each in storage.list() if each.endswith(".parquet")]
    storage, name = file_at(address)
    return storage, [each for each in storage.list() if each == name]


def _parts(storage: Storage, file: str, rules: Mapping[str, Rule]) -> Iterator[DecodedGroups]:
    """The row groups of a table of ads."""
    for row_group in row_groups_of_table(storage, file, rules):
        table = read_row_group(storage, row_group, list(source_columns(rules)))
        yield decode_unlabelled(table, rules, storage.full(file), row_group.first_row)


def _last_ads(
    storage: Storage, row_group: RowGroup, rules: Mapping[str, Rule], label: str, column: str, seen: Index
) -> DecodedGroups:
    """Return the last impression of every ad of the row group that is not in `seen`."""
    table = read_row_group(storage, row_group, list(source_columns(rules)))
    columns = decode(table, rules, label, storage.full(row_group.file), row_group.first_row).columns
    keys_B = columns[column].values
    keys_U, first_U = np.unique(keys_B[::-1], return_index=True)
    index_U = (len(keys_B) - 1 - first_U)[~np.isin(keys_U, seen)]
    return DecodedGroups(
        {name: _rows(rows, index_U) for name, rows in columns.items() if name != label}, np.arange(len(index_U) + 1)
    )


def _rows(rows: ColumnRows, index_M: Index) -> ColumnRows:
    """These rows alone."""
    values, lengths_M = rows.take(index_M)
    return ColumnRows(
        values, None if rows.offsets is None else np.concatenate([[0], np.cumsum(lengths_M)]).astype(np.int64)
    )


def _batch(inputs: Mapping[str, Any], count: int) -> Batch:
    return Batch(
        **inputs,
        group_of_sample_B=np.zeros(count, np.int64),
        label_B=np.zeros(count, np.float32),
        group_id_B=np.zeros(count, np.int64),
        global_samples=count,
    )


Vectors = NDArray[np.float32]


def towers(trained: TrainedRun) -> TwoTower:
    """Return the run's two towers. Raises ConfigError where it has another model."""
    model = trained.engine.model
    if not isinstance(model, TwoTower):
        raise ConfigError(
            f"{trained.saved.folder} has model.base={trained.config.model.base}: it has no vector of an ad; "
            "train one with model.base=two_tower"
        )
    return model


def origin_of(trained: TrainedRun) -> IndexOrigin:
    """Describe the vectors of this run and checkpoint for an index."""
    return IndexOrigin(
        run=trained.saved.folder.name,
        checkpoint=trained.saved.checkpoint.name,
        checkpoint_digest=trained.saved.digest,
        key_column=trained.schema.new_ad_column,
        bias=float(towers(trained).bias.detach()),
        stores={name: partition.snapshot_id for name, partition in trained.partitions.items()},
    )


def ad_vectors(
    trained: TrainedRun, ads: Ads, batch_size: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> Vectors:
    """Compute the vectors of all ads, (N, W) float32; for a run opened by one rank.

    `progress` gets ads done and all of them. Raises TrainerError where a vector is not finite.
    """
    model = towers(trained)

    def network(fields: Mapping[str, FieldVectors], dense: Mapping[str, Tensor], _: Tensor) -> Tensor:
        return model.ad_vectors(fields, dense)

    parts = [np.empty((0, model.width))]
    for batch in ads.batches(trained.schema, model.ad_fields, batch_size):
        parts.append(trained.engine.compute(trained.engine.prepare(batch, "eval"), network))
        progress(sum(map(len, parts)), len(ads.keys_N))
    return finite(np.concatenate(parts).astype(np.float32))


def user_vectors(trained: TrainedRun, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Vectors]]:
    """Yield each batch with the vectors of its groups, (G, W) float32."""
    model = towers(trained)

    def network(fields: Mapping[str, FieldVectors], dense: Mapping[str, Tensor], _: Tensor) -> Tensor:
        return model.user_vectors(fields, dense)

    for batch in batches:
        yield batch, finite(trained.engine.compute(trained.engine.prepare(batch, "eval"), network).astype(np.float32))
