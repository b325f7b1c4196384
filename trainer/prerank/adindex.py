"""Vectors of ads and users by the two towers of a run; indexes of ads, their recall, and searches for users.

An index is the vectors of ads and the structure of faiss over them, published together.

Each version of the address (see `featurestore.published`) has these files:

    index.json        what it was made of, its recall, and the sha256 of the others
    index.npz         the structure of faiss, by featurestore.index
    ads.parquet       key, vector (a list of float32, of one width)

For a tower, ads are sample groups with one ad each and nothing else, so the engine takes them as it takes samples. For
runs opened by one rank.

Letters of shapes: N ads or rows, K queries, C candidates found of each, W width of the vectors, B
samples, G groups, U unique keys.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field as Setting

from featurestore.errors import CorruptFileError
from featurestore.format.datafile import digest_of, read_verified
from featurestore.index import VectorIndex
from featurestore.keys import Float32Array, Int64Array, id_of_text
from featurestore.published import versions
from featurestore.spec import Frozen, IndexKind, Sealed, read_sealed, seal
from featurestore.storage.storage import Storage, file_at
from featurestore.store import SnapshotId
from trainer.comm import SoloComm
from trainer.errors import AdIndexError, ConfigError, DataError, DataNotFoundError, SchemaError
from trainer.evaluation.predict import places
from trainer.models.nets import TwoTower
from trainer.prerank import MIN_RECALL
from trainer.problems import Problem
from trainer.runs.open import test_reader
from trainer.runs.saved import TEST, TRAIN, TrainedRun, finite, open_test, vector_lists
from trainer.samples import columns as sample_columns
from trainer.samples.columns import ColumnRows, DecodedGroups, Rule, concatenate, decode, rules_of, source_columns
from trainer.samples.index import RowGroup, open_index, read_row_group, row_groups_of_table
from trainer.samples.reader import Batch, Jagged, inputs_of
from trainer.schema.fields import Field, Schema

Keys = Int64Array
Vectors = Float32Array
QuerySource = Literal["users", "ads"]

STATE, STRUCTURE, ADS = "index.json", "index.npz", "ads.parquet"
KEEP_REPLACED_S = 3600.0  # how long readers may use a version after another one took its place
COUNT = 10  # candidates of a query whose recall is measured when an index is written
NUM_QUERIES = 500
# Scores of two structures differ in the last bits; smaller differences count as equal.
_TIE = 1e-5
# The composition of a batch moves the last bits of a vector; smaller differences count as equal.
_SAME = 1e-5


def sample_of(vectors_NW: Vectors) -> Vectors:
    """Draw at most `NUM_QUERIES` of these vectors by a fixed seed."""
    chosen_K = np.random.default_rng(0).permutation(len(vectors_NW))[:NUM_QUERIES]
    return np.ascontiguousarray(vectors_NW[np.sort(chosen_K)])


def recall_at(index: VectorIndex, exact: VectorIndex, queries_KW: Vectors, count: int) -> float:
    """Measure the share of the `count` best of `exact`, a flat index of the same ads, that `index` finds; K >= 1.

    An ad whose score is that of the last of the best is one of them: ads with equal vectors must not count as misses.
    """
    _, best_KC = exact.search(queries_KW, count)
    _, found_KC = index.search(queries_KW, count)
    last_K1 = best_KC[:, : found_KC.shape[1]][:, -1:]
    return float((found_KC >= last_K1 - _TIE * np.abs(last_K1)).mean())


def reach(index: VectorIndex, exact: VectorIndex, queries_KW: Vectors, limit: float) -> float:
    """Measure recall@COUNT of the index, whose effort is doubled while that is below `limit` and more effort helps."""
    recall = recall_at(index, exact, queries_KW, COUNT)
    while recall < limit and index.effort and index.largest_effort and index.effort < index.largest_effort:
        index.effort = min(2 * index.effort, index.largest_effort)
        recall = recall_at(index, exact, queries_KW, COUNT)
    return recall


class IndexOrigin(Frozen):
    """The origin of vectors. Those of two checkpoints cannot be compared, so an index has those of one."""

    run: str
    checkpoint: str
    checkpoint_digest: str
    key_column: str
    """Column of the samples, or of the table of ads, whose values are the keys."""
    bias: float
    """Logit = inner product + bias + what the context of the impression adds."""
    stores: dict[str, SnapshotId] = Setting(default_factory=dict)
    """The snapshots of images, by the store's name; empty for a model without images."""


class IndexState(Sealed):
    """The content of index.json, which describes a version of an index of ads."""

    kind: IndexKind
    dim: int
    num_ads: int
    recall: float
    """Recall@10 against exact search, of a search with the index's own effort."""
    min_recall: float
    origin: IndexOrigin
    queries: QuerySource | None
    """Users that recall is measured with; None for flat."""
    sha256: dict[str, str]
    """Digests of the other files, by name."""


Changes = dict[str, int]
"""The numbers of ads that are new in a version, changed (another vector), unchanged, and removed."""


class AdIndex:
    """One version of an index, open: its state and faiss's structure in memory."""

    def __init__(self, files: versions.PublishedFiles, state: IndexState, index: VectorIndex) -> None:
        self._files, self.state, self.index = files, state, index
        self.version = files.published.version

    @classmethod
    def build(
        cls,
        url: str,
        kind: IndexKind,
        keys_N: Keys,
        vectors_NW: Vectors,
        origin: IndexOrigin,
        users_KW: Vectors | None = None,
        min_recall: float = MIN_RECALL,
        after: int | None = None,
    ) -> "AdIndex":
        """Build an index at `url`, as the version after `after`, by default the newest.

        Files that no reader needs any more are removed. Of hnsw the recall is measured with vectors of users, without
        them with some of the ads, and the effort of a search is raised until it is `min_recall`; `warning` says where
        it never is. Raises InvalidRowsError for vectors that make no index, AdIndexError for a place with other files,
        CommitConflictError where another build published meanwhile, StorageError.
        """
        after = _replaceable_version(url) if after is None else after
        index, recall = VectorIndex.build(kind, keys_N, vectors_NW), 1.0
        source: QuerySource | None = None
        if kind != "flat":
            source = "ads" if users_KW is None else "users"
            queries_KW = sample_of(vectors_NW) if users_KW is None else users_KW
            recall = reach(index, VectorIndex.build("flat", keys_N, vectors_NW), queries_KW, min_recall)
        storage = Storage(url)
        contents = {STRUCTURE: index.save(), ADS: to_parquet(keys_N, vectors_NW)}
        state = IndexState(
            kind=index.kind,
            dim=index.dim,
            num_ads=index.num_keys,
            recall=recall,
            min_recall=min_recall,
            origin=origin,
            queries=source,
            sha256={name: digest_of(data, "sha256") for name, data in contents.items()},
        )
        contents[STATE] = seal(state)
        files = {name: versions.write_part(storage, name, data) for name, data in contents.items()}
        published = versions.publish(storage, files, after)
        versions.expire(storage, KEEP_REPLACED_S)
        return cls(versions.PublishedFiles(storage.url, published), state, index)

    @classmethod
    def open(cls, url: str) -> "AdIndex":
        """Open the newest version at `url`. Raises DataNotFoundError, CorruptFileError, StorageError."""
        files = versions.open_published(url)
        if not isinstance(files, versions.PublishedFiles) or STATE not in files.list():
            raise DataNotFoundError(Problem.NOT_AN_INDEX, url)
        try:
            state = read_sealed(files, STATE, IndexState)
        except FileNotFoundError as failure:
            raise CorruptFileError(Problem.MISSING, files.full(STATE)) from failure
        index = VectorIndex.load(_read(files, state, STRUCTURE))
        return cls(files, state, index)

    @property
    def warning(self) -> str | None:
        """A warning in one line if the index finds fewer of the best ads than it should."""
        state = self.state
        if state.recall >= state.min_recall:
            return None
        return (
            f"recall@{COUNT} of this {state.kind} index is {state.recall:.3f}, below the limit of {state.min_recall:g},"
            f" with the largest effort ({self.index.effort}) too: take --index flat"
        )

    def check_origin(self, origin: IndexOrigin) -> None:
        """Check whose vectors these are.

        Raises AdIndexError where they are of another checkpoint, and AnotherStoreError where their images were looked
        up in another store."""
        mine = self.state.origin
        if mine.checkpoint_digest != origin.checkpoint_digest:
            vectors_of = mine.checkpoint, mine.run, origin.checkpoint, origin.run
            raise AdIndexError(Problem.INDEX_OF_OTHER_CHECKPOINT, self._files.url, *vectors_of)
        for name in mine.stores.keys() & origin.stores.keys():
            mine.stores[name].check(
                origin.stores[name], f"the index {self._files.url}", "build the index again, without --add"
            )

    def vectors(self) -> tuple[Keys, Vectors]:
        """Read keys, ascending, and vectors of all ads, (N,) and (N, W). Raises CorruptFileError."""
        table = pq.read_table(pa.BufferReader(_read(self._files, self.state, ADS)))
        vector: Any = table[VECTOR].combine_chunks()
        return table[KEY].to_numpy(), vector.flatten().to_numpy().reshape(-1, self.state.dim)

    def update(
        self,
        keys_N: Keys,
        vectors_NW: Vectors,
        origin: IndexOrigin,
        users_KW: Vectors | None = None,
        max_gone: float | None = None,
    ) -> tuple["AdIndex", Changes]:
        """Build the next version, with these ads too, of the same kind and limit; none where nothing is new.

        `users_KW`: see `build`. `max_gone`: these are all ads, so the others are removed, unless that is a larger share
        of the index: a table may be cut short. Raises AdIndexError, CommitConflictError, InvalidRowsError,
        StorageError.
        """
        self.check_origin(origin)
        (known_K, old_KW), state = self.vectors(), self.state
        gone_K = ~np.isin(known_K, keys_N)
        num_gone = 0 if max_gone is None else int(gone_K.sum())
        if max_gone is not None and num_gone > max_gone * len(known_K):
            raise AdIndexError(Problem.TOO_MANY_GONE, num_gone, len(known_K), self._files.url, max_gone)
        place_N, is_known_N = places(known_K, keys_N)
        same_N = is_known_N & np.isclose(old_KW[place_N], vectors_NW, rtol=_SAME, atol=_SAME).all(axis=1)
        changes = {
            "new": int((~is_known_N).sum()),
            "changed": int((is_known_N & ~same_N).sum()),
            "unchanged": int(same_N.sum()),
            "removed": num_gone,
        }
        if same_N.all() and not num_gone:
            return self, changes
        kept_K = gone_K if max_gone is None else np.zeros_like(gone_K)
        mine_NW = np.where(same_N[:, None], old_KW[place_N], vectors_NW)  # to the last bit
        keys, vectors = np.concatenate([known_K[kept_K], keys_N]), np.concatenate([old_KW[kept_K], mine_NW])
        url, users, limit = self._files.url, users_KW, state.min_recall
        return AdIndex.build(url, state.kind, keys, vectors, origin, users, limit, self.version), changes


def _replaceable_version(url: str) -> int:
    """Return the number of the newest version at `url`, 0 for none.

    Raises AdIndexError where there are files that are not of an index: readers would no longer find them.
    """
    files = versions.open_published(url)
    if isinstance(files, versions.PublishedFiles):
        others, version = ([] if STATE in files.list() else files.list()), files.published.version
    else:
        others, version = [name for name in files.list() if name not in (versions.FILES, versions.VERSIONS)], 0
    if others:
        raise AdIndexError(Problem.NOT_ONLY_AN_INDEX, url, others[0])
    return version


def _read(files: Storage, state: IndexState, name: str) -> bytes:
    """Read a whole file, and verify its digest. Raises CorruptFileError."""
    try:
        return read_verified(files, name, "sha256", state.sha256.get(name, ""))
    except FileNotFoundError as failure:
        raise CorruptFileError(Problem.MISSING, files.full(name)) from failure


KEY, VECTOR = "key", "vector"


def to_parquet(keys_N: Keys, vectors_NW: Vectors) -> bytes:
    """Write columns key, ascending, and vector, lists of one width of float32."""
    order_N = np.argsort(keys_N)
    sink = pa.BufferOutputStream()
    vectors = vector_lists(vectors_NW[order_N].astype(np.float32))
    table = pa.table({KEY: pa.array(keys_N[order_N]), VECTOR: vectors})
    pq.write_table(table, sink, compression="lz4", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


_LOOKED_AT = 4 * NUM_QUERIES  # groups: a user has several


@dataclass(frozen=True)
class Ads:
    """Ads in memory: row n of every column belongs to ad n, whose key is `keys_N[n]`; no key comes twice."""

    keys_N: Int64Array
    columns: Mapping[str, ColumnRows]

    def batches(self, schema: Schema, fields: Sequence[Field], size: int) -> Iterator[Batch]:
        """Divide the ads into batches without users and context: only `fields` have rows."""
        names = {field.name for field in fields}
        nothing = Jagged(np.empty(0, np.int64), np.empty(0, np.int32))
        for start in range(0, len(self.keys_N), size):
            index_B = np.arange(start, min(start + size, len(self.keys_N)))

            def taken(field: Field, column: str, index_B: Int64Array = index_B) -> Jagged:
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
            parts.append(sample_columns.decode_unlabelled(table, rules, storage.full(name), group.first_row))
    if not parts:
        raise DataNotFoundError(Problem.ADS_WITHOUT_ROWS, address)
    column = schema.new_ad_column
    columns = concatenate(parts).columns
    keys_U, count_U = np.unique(columns[column].values, return_counts=True)
    if (twice := keys_U[count_U > 1]).size:
        raise DataError(Problem.AD_TWICE, address, column, twice[0])
    return Ads(columns[column].values, columns)


def ads_of_samples(samples: str, schema: Schema, fields: Sequence[Field]) -> Ads:
    """Find the distinct ads of train and test samples, with the values of their last impression.

    Last: in the order of test after train, of file names, and of rows. Raises DataError, SchemaError.
    """
    storage, column = versions.open_published(samples), schema.new_ad_column
    splits = [split for split in (TRAIN, TEST) if any(name.endswith(".parquet") for name in storage.list(split))]
    if not splits:
        raise DataNotFoundError(Problem.SAMPLES_WITHOUT_ADS, samples)
    rules = {schema.label: Rule("ad", 1, "integer"), **_rules(schema, fields)}
    seen, parts = np.empty(0, np.int64), []
    for split in reversed(splits):
        for row_group in reversed(open_index(SoloComm(), storage, split, schema).row_groups):
            last = _last_ads(storage, row_group, rules, schema.label, column, seen)
            new_U = last.columns[column].values
            seen = np.insert(seen, np.searchsorted(seen, new_U), new_U)
            parts.append(last)
    columns = concatenate(parts).columns
    return Ads(columns[column].values, columns)


def _rules(schema: Schema, fields: Sequence[Field]) -> dict[str, Rule]:
    """Return the rules of the columns of these fields and of the key, as in samples."""
    wanted = {field.column_name for field in fields} | {field.weights for field in fields} | {schema.new_ad_column}
    return {column: rule for column, rule in rules_of(schema).items() if column in wanted}


def _files(address: str) -> tuple[Storage, list[str]]:
    """The folder and the names in it of a Parquet file, or of all of them in a folder."""
    if not address.endswith(".parquet"):
        storage = Storage(address)
        if storage.is_local and Path(storage.url).is_file():
            raise DataNotFoundError(Problem.NOT_A_TABLE_OF_ADS, address)
        return storage, [each for each in storage.list() if each.endswith(".parquet")]
    storage, name = file_at(address)
    return storage, [each for each in storage.list() if each == name]


def _last_ads(
    storage: Storage, row_group: RowGroup, rules: Mapping[str, Rule], label: str, column: str, seen: Int64Array
) -> DecodedGroups:
    """Return the last impression of every ad of the row group that is not in `seen`; both are in order of ads."""
    table = read_row_group(storage, row_group, list(source_columns(rules)))
    columns = decode(table, rules, label, storage.full(row_group.file), row_group.first_row).columns
    keys_B = columns[column].values
    keys_U, first_U = np.unique(keys_B[::-1], return_index=True)
    index_U = (len(keys_B) - 1 - first_U)[~places(seen, keys_U)[1]]
    return DecodedGroups(
        {name: rows.rows(index_U) for name, rows in columns.items() if name != label}, np.arange(len(index_U) + 1)
    )


def towers(trained: TrainedRun) -> TwoTower:
    """Return the run's two towers. Raises ConfigError where it has another model."""
    model = trained.engine.model
    if not isinstance(model, TwoTower):
        raise ConfigError(Problem.NO_VECTORS_OF_ADS, trained.saved.folder, trained.config.model.base)
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


def user_queries(trained: TrainedRun) -> Vectors | None:
    """Compute user vectors from the run's own samples, of the test days if there are any, to measure an index.

    None where the samples are gone or empty.
    """
    data = trained.config.data
    for split, days in ((TEST, data.test_days), (TRAIN, data.train_days)):
        if days != []:
            with contextlib.suppress(DataError, SchemaError):
                index = open_index(trained.comm, data.samples, split, trained.schema, days)
                reader = test_reader(trained.config, trained.comm, index, trained.schema)
                parts, found = [np.empty((0, towers(trained).width), np.float32)], 0
                for _, users_GW in user_vectors(trained, reader.batches()):
                    parts.append(users_GW)
                    if (found := found + len(users_GW)) >= _LOOKED_AT:
                        break
                if found:
                    return sample_of(np.concatenate(parts)[:_LOOKED_AT])
    return None


def candidates(
    trained: TrainedRun, ads: AdIndex, samples: str | None, user: str, count: int
) -> list[tuple[int, float]]:
    """Find keys and inner products of the best ads for a user, as of the user's last test group.

    `user`: a number or a text, as the samples have it. Raises DataError where no test sample is of that user.
    """
    last: Batch | None = None
    number, tests = id_of_text(user), open_test(trained.comm, trained.config, trained.schema, samples)
    for batch in test_reader(trained.config, trained.comm, tests, trained.schema).batches():
        if (batch.group_id_B == number).any():
            last = batch
    if last is None:
        where = samples or trained.config.data.samples
        raise DataNotFoundError(Problem.USER_NOT_TESTED, user, where)
    _, vectors_GW = next(user_vectors(trained, iter([last])))
    group = last.group_of_sample_B[last.group_id_B == number][-1]
    keys_1C, score_1C = ads.index.search(vectors_GW[group : group + 1], count)
    return [(int(key), float(value)) for key, value in zip(keys_1C[0], score_1C[0], strict=True) if np.isfinite(value)]
