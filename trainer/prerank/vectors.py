"""Vectors of ads and users by the two towers of a run, and searches for users.

Ads become sample groups with one ad each and nothing else, so the engine takes them as it takes samples. For runs
opened by one rank. Letters of shapes: as in trainer/prerank/artifact.py, and B samples, G groups, U unique keys.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from featurestore.keys import id_of_text
from featurestore.published.versions import open_published
from featurestore.storage.storage import Storage, file_at
from trainer.comm import SoloComm
from trainer.errors import ConfigError, DataError, DataNotFoundError, SchemaError
from trainer.models.nets import TwoTower
from trainer.prerank.artifact import NUM_QUERIES, AdIndex, IndexOrigin, Queries, Vectors, sample_of
from trainer.runs.open import test_reader
from trainer.runs.saved import TEST, TRAIN, TrainedRun, finite, open_test
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
from trainer.samples.reader import Batch, Jagged, SampleReader, inputs_of
from trainer.schema import Field, Schema

_GROUPS_PER_QUERY = 4  # a user has several


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

            none_B = np.zeros(len(index_B), np.int64)
            yield Batch(
                **inputs_of(schema, taken),
                group_of_sample_B=none_B,
                label_B=none_B.astype(np.float32),
                group_id_B=none_B,
                global_samples=len(index_B),
            )


def ads_of_table(address: str, schema: Schema, fields: Sequence[Field]) -> Ads:
    """Read the rows of a Parquet file, or of a folder of them, with the columns of `fields`: one value or list a row.

    Raises DataError for bad files and values and for a key that comes twice, SchemaError for missing columns.
    """
    storage, names = _files(address)
    rules = {
        column: replace(rule, side="user", depth=rule.depth - 1) for column, rule in _rules(schema, fields).items()
    }
    parts = []
    for name in names:
        for group in row_groups_of_table(storage, name, rules):
            table = read_row_group(storage, group, list(source_columns(rules)))
            parts.append(decode_unlabelled(table, rules, storage.full(name), group.first_row))
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
    splits = [split for split in (TRAIN, TEST) if any(name.endswith(".parquet") for name in storage.list(split))]
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

    parts = [np.empty((0, model.width))]
    for batch in ads.batches(trained.schema, model.ad_fields, batch_size):
        prepared = trained.engine.prepare(batch, "eval")
        parts.append(trained.engine.compute(prepared, lambda fields, dense, _: model.ad_vectors(fields, dense)))
        progress(sum(map(len, parts)), len(ads.keys_N))
    return finite(np.concatenate(parts).astype(np.float32))


def user_vectors(trained: TrainedRun, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Vectors]]:
    """Yield each batch with the vectors of its groups, (G, W) float32."""
    model = towers(trained)

    for batch in batches:
        prepared = trained.engine.prepare(batch, "eval")
        users_GW = trained.engine.compute(prepared, lambda fields, dense, _: model.user_vectors(fields, dense))
        yield batch, finite(users_GW.astype(np.float32))


def reader_of_tests(trained: TrainedRun, samples: str | None) -> SampleReader:
    """Open the test impressions of `samples`, else of the run. Raises DataError, SchemaError."""
    index = open_test(trained.comm, trained.config, trained.schema, samples)
    return test_reader(trained.config, trained.comm, index, trained.schema)


def users_of_tests(trained: TrainedRun, samples: str | None, most: int) -> Queries:
    """Compute vectors of at most `most` users of the first test impressions of `samples`, else of the run.

    Raises DataError, SchemaError."""
    users_KW = _first_users(trained, reader_of_tests(trained, samples), _GROUPS_PER_QUERY * most)
    return sample_of(users_KW, "users", most)


def user_queries(trained: TrainedRun) -> Queries | None:
    """Compute user vectors from the run's own samples, of the test days if there are any, to measure an index.

    None where the samples are gone or empty.
    """
    data = trained.config.data
    for split, days in ((TEST, data.test_days), (TRAIN, data.train_days)):
        if days != []:
            with contextlib.suppress(DataError, SchemaError):
                index = open_index(trained.comm, data.samples, split, trained.schema, days)
                reader = test_reader(trained.config, trained.comm, index, trained.schema)
                if len(users_KW := _first_users(trained, reader, _GROUPS_PER_QUERY * NUM_QUERIES)):
                    return sample_of(users_KW, "users")
    return None


def candidates(
    trained: TrainedRun, ads: AdIndex, samples: str | None, user: str, count: int
) -> list[tuple[int, float]]:
    """Find keys and inner products of the best ads for a user, as of the user's last test group.

    `user`: a number or a text, as the samples have it. Raises DataError where no test sample is of that user.
    """
    last: Batch | None = None
    number = id_of_text(user)
    for batch in reader_of_tests(trained, samples).batches():
        if (batch.group_id_B == number).any():
            last = batch
    if last is None:
        where = samples or trained.config.data.samples
        raise DataNotFoundError(f"user {user} has no test sample in {where}; choose one that has, or other --samples")
    _, vectors_GW = next(user_vectors(trained, iter([last])))
    group = last.group_of_sample_B[last.group_id_B == number][-1]
    keys_1C, score_1C = ads.index.search(vectors_GW[group : group + 1], count)
    return [(int(key), float(value)) for key, value in zip(keys_1C[0], score_1C[0], strict=True) if np.isfinite(value)]


def _first_users(trained: TrainedRun, reader: SampleReader, wanted: int) -> Vectors:
    """Vectors of the first `wanted` groups, or of all."""
    parts = [np.empty((0, towers(trained).width), np.float32)]
    for _, users_GW in user_vectors(trained, reader.batches()):
        parts.append(users_GW)
        if sum(map(len, parts)) >= wanted:
            break
    return np.concatenate(parts)[:wanted]
