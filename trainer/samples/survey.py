"""Passes over all samples before a run: the digest of their files, statistics, lacking images, the dictionary of IDs.

The ranks share each of them; the results of the first three are kept in a cache. Letters of shapes: P ranks,
W numbers a row, S values kept, U distinct keys of images.

**Digest.** Names and counts of rows do not tell: labels can be turned round in place. Nor does a checksum in a file's
metadata: tools that read, change and write a table copy it. So each file is read once, by one of the ranks, and read
again only when its tag (inode, size and times; an ETag on an object store) is another one.

**Statistics** scale numbers and cut them into buckets. Every row group gives its own part: count, mean and squared
distances of each number, and up to some thousand of its values at equal distances in their order. Parts are merged in
the order of the row groups, in float64, so no bit hangs on which rank read which. A schema with its statistics filled
in is a schema like any other: the checkpoint's origin has it, and who opens the run takes it from there.

**Images.** Uses are rows of three numbers, (U, 3): the key, the impressions and the behaviours that name it; distinct
keys, ascending.

**Dictionary**, ids.parquet in a run's folder: the text of each hashed ID of the training samples, to look back. Columns
id, ascending, and text, in 256 row groups by the top bits of the ID; a whole number is its own ID and not in it. Each
rank collects what its share of the samples has and writes it in parts of the same 256 row groups; rank 0 merges them,
one row group after the other. So a rank holds `TEXTS_HELD` texts and rank 0 a 256th of all, however many there are.
Samples that were made of logs have such a file next to them, of the texts of the logs, which is merged too.
"""

import contextlib
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from featurestore.console.files import replaced_file
from featurestore.console.output import text_console
from featurestore.errors import StorageError
from featurestore.format.codec import Moments
from featurestore.keys import NO_IMAGE, AnyArray, Float64Array, Int64Array, owner_of, shard_of
from featurestore.lookup.cache import SAMPLES, default_cache_dir
from featurestore.published.paths import RemotePath, RunPath, open_file, remove_all, run_path, written_locally
from featurestore.published.versions import open_published
from featurestore.storage.local import claim, is_private
from featurestore.storage.storage import Storage, digest_of, settled_tags
from featurestore.store import FeatureStore
from trainer.comm import Comm, SoloComm
from trainer.errors import DataError, SchemaError
from trainer.problems import Problem
from trainer.samples.columns import SPLITS, Rule, before_scaling, filled, in_either_split, rules_of, sample_files
from trainer.samples.index import RowGroup, SampleIndex, open_index, read_texts, read_values
from trainer.schema import fields as schema_fields
from trainer.schema.fields import DEFAULT_STORE, IDS_FILE, IMAGES_FILE, SCHEMA_FILE, Field, Schema, load_schema
from trainer.schema.names import BUCKETS, TEXTS, buckets_of, by_bucket, merged_names, table_of_texts, write_buckets

if TYPE_CHECKING:
    from featurestore.lookup.partition import FeaturePartition

_REMEMBERED = 16  # measurements of one folder of samples: other days, other snapshots
_THREADS = 4  # waiting for the disk or the network; xxh3 takes 18 GB/s on one core
_REPORTED_BYTES = 1 << 30


def samples_digest(comm: Comm, index: SampleIndex, cache_dir: str | Path | None = None) -> str:
    """Compute the digest of the samples' names, counts and contents, which checkpoints keep.

    The files of `index` whose digests are not cached yet are read, by each rank its share; every rank calls it. The
    cache is in `cache_dir`/samples on rank 0's machine. Raises DataError on all ranks together.
    """
    files = list(dict.fromkeys(each.file for each in index.row_groups))  # by name, whichever split they are in
    cache = _cache_file(index, "digests", cache_dir)
    known, tags, sizes = comm.on_rank_0(lambda: _cached_digests(index.storage, cache))
    unknown = sorted(set(files) - known.keys(), key=lambda file: (-sizes.get(file, 0), file))  # even shares of bytes
    size_bytes = sum(sizes.get(file, 0) for file in unknown)
    if size_bytes > _REPORTED_BYTES:
        console = text_console(quiet=comm.rank != 0)
        console.print(f"reading {size_bytes / 1e9:.1f} GB of samples in {index.storage.url} to tell them from others")
    own = unknown[comm.rank :: comm.size]
    with comm.agreed(), ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(own, pool.map(partial(_digest, index.storage), own), strict=True))
    for share in comm.allgather_object(found, name="samples_digest"):
        known |= share
    if unknown:
        kept = {f"{file} {tag}": known[file] for file, tag in tags.items() if file in known}
        comm.on_rank_0(lambda: _cache(cache, kept))
    return xxhash.xxh3_128_hexdigest("\n".join([index.layout_digest, *(known[file] for file in files)]).encode())


def _cached_digests(storage: Storage, cache: Path) -> tuple[dict[str, str], dict[str, str], dict[str, int]]:
    """Return the digests in the cache, the tags and the sizes in bytes of the samples' files.

    Files that were written a moment ago have no tag: they may change within the same one.
    """
    entries = [each for split in SPLITS for each in storage.entries(split, recursive=False)]
    cached, tags = _cached(cache), settled_tags(entries)
    known = {file: str(cached[key]) for file, tag in tags.items() if (key := f"{file} {tag}") in cached}
    return known, tags, {each.path: each.size_bytes for each in entries}


def _digest(storage: Storage, file: str) -> str:
    try:
        return in_either_split(partial(digest_of, storage), file)
    except (OSError, StorageError) as failure:
        raise DataError(Problem.REFUSED, "read", storage.full(file), failure) from failure


def measured_once(
    comm: Comm, index: SampleIndex, what: str, asked: object, cache_dir: str | None, measured: Callable[[], Any]
) -> Any:
    """Return the result of `measured` for `asked`, or its copy in the cache folder of rank 0's machine.

    The folder keeps the last ones of each address of samples. Every rank calls it.
    """
    key = xxhash.xxh3_128_hexdigest(json.dumps(asked, sort_keys=True).encode())
    cache = _cache_file(index, what, cache_dir)
    found = comm.on_rank_0(lambda: _cached(cache).get(key))
    if found is None:
        found = measured()
        kept = [*_cached(cache).items(), (key, found)][-_REMEMBERED:]
        comm.on_rank_0(lambda: _cache(cache, dict(kept)))
    return found


def _cache_file(index: SampleIndex, what: str, cache_dir: str | Path | None) -> Path:
    """Return the file of the cache folder with measurements of the samples at this address."""
    name = f"{xxhash.xxh3_64_hexdigest(index.storage.url.encode())}-{what}.json"
    return Path(cache_dir or default_cache_dir()) / SAMPLES / name


def _cached(file: Path) -> dict[str, Any]:
    """Read the file of `_cache`; nothing where it cannot be read, or where other users may write to it."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if is_private(file.lstat()) else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _cache(file: Path, values: Mapping[str, Any]) -> None:
    """Keep `values` as JSON in a file of the cache folder for samples; do nothing where it cannot be written."""
    part = file.with_name(f".tmp-{uuid.uuid4().hex}")
    with contextlib.suppress(OSError, StorageError):
        claim(file.parent.parent)
        claim(file.parent)
        part.touch(mode=0o600)
        part.write_text(json.dumps(values), encoding="utf-8")
        part.replace(file)


_KEPT_VALUES = 1 << 20
"""Values from which quantiles are taken, over all row groups; each is off by at most half a kept value of its group."""
_LEAST_KEPT = 64
_METHOD = 1  # raise it when the measurement changes, so that cached statistics are measured again
FOUND = ("mean", "std", "boundaries")
DECLARED = ("kind", "width", "transform", "buckets", "fill")
"""The settings of a field that determine its statistics, besides the numbers in its column."""


@dataclass(frozen=True)
class NumberSums:
    """A summary of a field's numbers in one or several row groups, without missing ones."""

    moments_W: tuple[Moments, ...]
    smallest_W: Float64Array
    largest_W: Float64Array
    kept_S: Float64Array
    """Values of the row groups for buckets, one group after the other, each ascending."""
    counts_S: Float64Array
    """Number of values that each of them represents."""

    @classmethod
    def of_all(cls, parts: Sequence["NumberSums"]) -> "NumberSums":
        """Merge the parts of several row groups, in their order."""
        return cls(
            tuple(reduce(Moments.merged, each) for each in zip(*(part.moments_W for part in parts), strict=True)),
            np.minimum.reduce([part.smallest_W for part in parts]),
            np.maximum.reduce([part.largest_W for part in parts]),
            np.concatenate([part.kept_S for part in parts]),
            np.concatenate([part.counts_S for part in parts]),
        )


def fill_in(schema: Schema, found: Mapping[str, Mapping[str, Any]]) -> Schema:
    """Fill in the statistics in `found` for each field that lacks them, if its settings are the same."""

    def filled_in(field: Field) -> Field:
        theirs, mine = found.get(field.name, {}), field.model_dump(mode="json", exclude_none=True)
        if not field.lacks_statistics or any(mine.get(name) != theirs.get(name) for name in DECLARED):
            return field
        new = {name: theirs[name] for name in FOUND if name in theirs and name not in mine}
        return Field.model_validate(mine | new)

    return schema.model_copy(update={"fields": tuple(map(filled_in, schema.fields))})


def fields_to_measure(schema: Schema) -> tuple[Field, ...]:
    """List the fields that the training samples have to tell something of."""
    return tuple(field for field in schema.fields if field.lacks_statistics)


def measure(comm: Comm, index: SampleIndex, schema: Schema) -> dict[str, dict[str, Any]]:
    """Measure the statistics of fields that lack them in the samples of `index`, for `fill_in`; every rank calls it.

    Each rank reads every P-th row group, of the columns needed. Raises DataError on all ranks together, where a value
    cannot be used or a field has none.
    """
    fields, rules = fields_to_measure(schema), rules_of(schema)
    if not fields:
        return {}
    budget = max(_LEAST_KEPT, _KEPT_VALUES // max(len(index.row_groups), 1))
    mine, wanted = index.row_groups[comm.rank :: comm.size], {f.column_name: rules[f.column_name] for f in fields}

    def own_parts() -> list[dict[str, NumberSums]]:
        read = read_values(index, mine, wanted)
        return [{f.name: part_of(f, values[f.column_name], budget) for f in fields} for values in read]

    own = comm.on_all(own_parts)
    by_rank = comm.allgather_object(own, name="statistics")
    in_order = [by_rank[number % comm.size][number // comm.size] for number in range(len(index.row_groups))]
    return {f.name: _statistics(f, NumberSums.of_all([parts[f.name] for parts in in_order])) for f in fields}


def with_statistics(
    comm: Comm, index: SampleIndex, schema: Schema, digest: str, cache_dir: str | None = None
) -> Schema:
    """Fill in the statistics of the samples of `index`; `digest` is that of the samples. Every rank calls it.

    Raises DataError on all ranks together."""
    fields = fields_to_measure(schema)
    if not fields:
        return schema
    asked = [_METHOD, digest, [field.model_dump(mode="json") for field in fields]]
    return fill_in(schema, measured_once(comm, index, "inputs", asked, cache_dir, lambda: measure(comm, index, schema)))


def part_of(field: Field, values_N: AnyArray, budget: int) -> NumberSums:
    """Summarise these values of a field; of buckets at most `budget` values are kept."""
    width = field.width or 1 if field.kind == "dense" else 1
    numbers_MW = filled(field, values_N) if field.is_bucketed else before_scaling(field, values_N)
    numbers_MW = numbers_MW.reshape(-1, width)
    present = [column[~np.isnan(column)] for column in numbers_MW.T]
    everything = np.concatenate(present)
    kept_S = np.sort(everything) if field.is_bucketed else np.empty(0)
    each = 1.0
    if len(kept_S) > budget:
        each = len(kept_S) / budget
        kept_S = kept_S[((np.arange(budget) + 0.5) * each).astype(np.int64)]
    return NumberSums(
        tuple(_moments(column) for column in present),
        np.array([column.min(initial=np.inf) for column in present]),
        np.array([column.max(initial=-np.inf) for column in present]),
        kept_S,
        np.full(len(kept_S), each),
    )


def quantile_boundaries(part: NumberSums, buckets: int) -> tuple[float, ...]:
    """Find where `buckets` equally full buckets begin, but for the first; fewer, where a value fills more than one."""
    order_S = np.argsort(part.kept_S, kind="stable")
    kept_S, until_S = part.kept_S[order_S], np.cumsum(part.counts_S[order_S])
    shares = np.arange(1, buckets) / buckets * until_S[-1]
    starts = np.unique(kept_S[np.searchsorted(until_S, shares, side="right")])
    return tuple(starts[starts > part.smallest_W.min()].tolist())


def _moments(column_M: Float64Array) -> Moments:
    if not len(column_M):
        return Moments.empty(1)
    mean = column_M.mean()
    return Moments(len(column_M), np.array([mean]), np.array([np.square(column_M - mean).sum()]))


def _statistics(field: Field, part: NumberSums) -> dict[str, Any]:
    """A constant column has a deviation of 1, so that it becomes zero and not NaN."""
    counts = [moments.count for moments in part.moments_W]
    if not all(counts):
        raise DataError(Problem.NO_NUMBERS, field.name, field.column_name, "bucket" if field.is_bucketed else "mean")
    found = field.model_dump(mode="json", exclude_none=True)
    if field.is_bucketed:
        assert isinstance(field.buckets, int)
        return found | {"boundaries": list(quantile_boundaries(part, field.buckets))}
    if field.mean is None:
        found["mean"] = [float(moments.mean_D[0]) for moments in part.moments_W]
    if field.std is None and field.transform in schema_fields.STANDARDIZED:
        std_W = np.array([np.sqrt(moments.m2_D[0] / moments.count) for moments in part.moments_W])
        found["std"] = np.where(part.smallest_W < part.largest_W, std_W, 1.0).tolist()
    return found


_HELD = 1 << 20  # uses that wait to be merged


@dataclass(frozen=True)
class LackingImages:
    """Images in samples that a store lacks, over all ranks; sums over keys, so an ad with two of them counts twice.

    `without`: impressions that name no image at all, which are among `impressions`. `of`: all impressions. `named`:
    images that the first of the indexes names, `found`: those of them that the store has.
    """

    images: int
    impressions: int
    behaviors: int
    without: int
    of: int
    named: int
    found: int


def merged_uses(parts: Sequence[Int64Array]) -> Int64Array:
    """Sum the uses of equal keys."""
    rows = np.concatenate([np.empty((0, 3), np.int64), *parts])
    keys_U, inverse_N = np.unique(rows[:, 0], return_inverse=True)
    counts = [np.bincount(inverse_N, rows[:, side], len(keys_U)).astype(np.int64) for side in (1, 2)]
    return np.column_stack([keys_U, *counts])


def uses_of(
    index: SampleIndex, row_groups: Iterable[RowGroup], rules: dict[str, Rule], fields: Sequence[Field]
) -> Int64Array:
    """Count the uses of the images of these content fields.

    Reads their columns alone, one row group after the other, and holds 24 bytes for each distinct image, twice while
    they are merged. Raises DataError.
    """
    sides = {field.column_name: field.side for field in fields}
    total, waiting, count = merged_uses([]), list[Int64Array](), 0
    for values in read_values(index, row_groups, {column: rules[column] for column in sides}):
        for column, side in sides.items():
            keys_U, counts_U = np.unique(values[column], return_counts=True)
            by_side = [counts_U * (side == each) for each in ("ad", "user")]
            waiting.append(np.column_stack([keys_U, *by_side]))
            count += len(keys_U)
        if count > max(_HELD, len(total)):
            total, waiting, count = merged_uses([total, *waiting]), [], 0
    return merged_uses([total, *waiting])


def lacking(
    comm: Comm, indexes: Sequence[SampleIndex], schema: Schema, fields: Sequence[Field], partition: "FeaturePartition"
) -> LackingImages:
    """Count the images that the samples name in these fields of one store, and the store lacks; every rank calls it.

    Each rank reads every P-th row group, then asks the owner of each key once. Raises DataError on all ranks together.
    """
    import torch

    rules = rules_of(schema)
    with comm.agreed():
        parts = [uses_of(each, each.row_groups[comm.rank :: comm.size], rules, fields) for each in indexes]
    own = merged_uses(parts)
    is_first_U = np.isin(own[:, 0], parts[0][:, 0]) & (own[:, 0] != NO_IMAGE)
    owner_U = owner_of(shard_of(own[:, 0], partition.info.num_shards), comm.size)
    splits_P = torch.from_numpy(np.bincount(owner_U, minlength=comm.size).astype(np.int32))
    asked = torch.from_numpy(np.column_stack([own, is_first_U])[np.argsort(owner_U, kind="stable")])
    received = comm.alltoall(asked, splits_P, name="image_uses")[0].numpy()
    served = merged_uses([received[:, :3]])
    of_first_U = np.unique(received[received[:, 3] > 0, 0])
    num_found = int(partition.contains(of_first_U).sum()) if len(of_first_U) else 0
    lacks = served[~partition.contains(served[:, 0])] if len(served) else served
    is_none_U = lacks[:, 0] == NO_IMAGE
    sums = [int((~is_none_U).sum()), *lacks[:, 1:].sum(0).tolist(), int(lacks[is_none_U, 1].sum())]
    sums += [sum(each.num_samples for each in indexes) if comm.rank == 0 else 0, len(of_first_U), num_found]
    return LackingImages(*comm.allreduce_sum_(torch.tensor(sums), name="image_uses.sums").tolist())


def example_image(index: SampleIndex, schema: Schema, fields: Sequence[Field]) -> str:
    """Name an image of the samples, by its key where no name is known; none if they have none. Raises DataError."""
    rules = rules_of(schema)
    for row_group in index.row_groups:
        keys_U = uses_of(index, [row_group], rules, fields)[:, 0]
        for key in keys_U[keys_U != NO_IMAGE][:1].tolist():
            return names_of([index], rules, fields, np.array([key])).get(key, str(key))
    return ""


def names_of(
    indexes: Sequence[SampleIndex], rules: dict[str, Rule], fields: Sequence[Field], keys_U: Int64Array
) -> dict[int, str]:
    """Find the names of images: in the samples' images.parquet, else in the samples, if they have texts.

    Images of samples that were made with keys have no name. Raises DataError.
    """
    storage = indexes[0].storage
    found = _named(run_path(storage.full(IMAGES_FILE)), keys_U.tolist()) if IMAGES_FILE in storage.list() else {}
    for index in indexes:
        columns = {field.column_name: rules[field.column_name] for field in fields}
        texts = {column: rule for column, rule in columns.items() if column in index.text_columns}
        if not texts or len(found) == len(keys_U):
            continue
        for encoded in read_texts(index, index.row_groups, texts):
            for place in np.flatnonzero(np.isin(encoded.ids_U, keys_U)).tolist():
                found[int(encoded.ids_U[place])] = encoded.texts_U[place]
    return found


def schema_beside(samples: Storage, schema_file: str | None) -> Schema:
    """Load a schema: of this file, else the one next to the samples, else the packaged one. Raises SchemaError."""
    own = samples.full(SCHEMA_FILE) if SCHEMA_FILE in samples.list() else None
    return load_schema(schema_file or own)


def list_missing(samples: str, store: str, schema_file: str | None = None, name: str = DEFAULT_STORE) -> pa.Table:
    """List the images that all samples name in the fields of a store, and its newest snapshot lacks.

    Columns image (its name, or its key where none is known), impressions, behaviors and why; ordered by impressions.
    Raises DataError, SchemaError, FeatureStoreError.
    """
    storage = open_published(samples)
    schema = schema_beside(storage, schema_file)
    rules = rules_of(schema)
    fields = [field for field in schema.of_kind("content") if field.store_name == name]
    if not fields:
        known = sorted({field.store_name for field in schema.of_kind("content")})
        raise SchemaError(Problem.STORE_OF_NO_FIELD, name, ", ".join(known) or "none")
    opened = FeatureStore.open(store)
    splits = [split for split in SPLITS if sample_files(storage, split)]
    indexes = [open_index(SoloComm(), storage, split, schema) for split in splits or SPLITS[:1]]
    uses = merged_uses([uses_of(each, each.row_groups, rules, fields) for each in indexes])
    uses = uses[~opened.snapshot().contains(uses[:, 0])]
    uses = uses[np.lexsort([uses[:, 0], -uses[:, 2], -uses[:, 1]])]
    bad = {row.key: row for row in opened.quarantine_rows()}
    names = {key: row.uri for key, row in bad.items()} | {NO_IMAGE: ""}
    names |= names_of(indexes, rules, fields, uses[:, 0])
    why = {key: f"quarantined: {row.reason}" for key, row in bad.items()} | {NO_IMAGE: "the logs name no image"}
    keys = uses[:, 0].tolist()
    return pa.table(
        {
            "image": [names.get(key, str(key)) for key in keys],
            "impressions": pa.array(uses[:, 1]),
            "behaviors": pa.array(uses[:, 2]),
            "why": [why.get(key, "not in the store") for key in keys],
        }
    )


TEXTS_HELD = 500_000


def write_dictionary(
    comm: Comm, folder: RunPath, index: SampleIndex, rules: Mapping[str, Rule], earlier: RunPath | None = None
) -> bool:
    """Write `folder`/ids.parquet, the same for any number of ranks; return False if the samples have no texts.

    Every rank calls it; `folder` is one for all of them. `earlier`: the dictionary of a run whose ID rows this one
    begins with; its entries are taken in, and those of the dictionary next to the samples. Raises, on all ranks
    together, DataError where two texts have one ID, or where samples cannot be read, and OSError.
    """
    known = [each for each in (earlier, run_path(index.storage.full(IDS_FILE))) if each is not None]
    earlier_parts = comm.on_rank_0(lambda: [each for each in known if each.is_file()])
    wanted = {column: rules[column] for column in sorted(index.text_columns)}
    if not wanted and not earlier_parts:
        return False
    scratch = folder / comm.broadcast_object(f".ids-{uuid.uuid4().hex}")

    def begin() -> None:
        for leftover in [each for each in folder.iterdir() if each.name.startswith(".ids-")]:
            remove_all(leftover)
        scratch.mkdir()

    comm.on_rank_0(begin)
    with comm.agreed(), written_locally(scratch) as local:
        collected = _collected(index, index.row_groups[comm.rank :: comm.size], wanted)
        for number, held in enumerate(collected):
            write_part(local / f"{comm.rank:05}-{number:05}.parquet", held)

    def publish() -> None:
        _merge([*scratch.iterdir(), *earlier_parts], folder)
        remove_all(scratch)

    comm.on_rank_0(publish)
    return True


@dataclass(frozen=True)
class IdDictionary:
    """The dictionary of a run, or of samples."""

    path: RunPath

    @classmethod
    def of_run(cls, folder: RunPath) -> "IdDictionary | None":
        """Open the dictionary of the run in `folder`; None if its samples had no texts."""
        return cls(folder / IDS_FILE) if (folder / IDS_FILE).is_file() else None

    @classmethod
    def of_samples(cls, samples: Storage) -> "IdDictionary | None":
        """Open the dictionary next to samples; None if their logs had no texts of IDs."""
        path = run_path(samples.full(IDS_FILE))
        return cls(path) if path.is_file() else None

    def texts(self, ids: Iterable[int]) -> dict[int, str]:
        """Find the texts of those of the IDs that are in it; reads the row groups that they are in.

        Raises DataError.
        """
        return _named(self.path, ids)

    def first(self, count: int) -> tuple[list[tuple[int, str]], int]:
        """Read the first `count` entries, and how many there are in all. Raises DataError."""
        found: list[tuple[int, str]] = []
        with _opened(self.path) as file:
            for number in range(file.num_row_groups):
                found += _entries(file.read_row_group(number).slice(0, count - len(found)))
                if len(found) == count:
                    break
            return found, file.metadata.num_rows


def texts_of_ids(ids: Iterable[int], dictionaries: Iterable[IdDictionary | None]) -> dict[int, str]:
    """Find the texts of IDs, each in the first of some dictionaries that has it. Raises DataError."""
    left, found = set(ids), dict[int, str]()
    for dictionary in dictionaries:
        if dictionary is not None and left:
            found |= dictionary.texts(left)
            left -= found.keys()
    return found


def _collected(
    index: SampleIndex, row_groups: Iterable[RowGroup], rules: Mapping[str, Rule]
) -> Iterator[dict[int, str]]:
    """Texts by ID, about `TEXTS_HELD` at a time."""
    held: dict[int, str] = {}
    for encoded in read_texts(index, row_groups, rules):
        for number, text in zip(encoded.ids_U.tolist(), encoded.texts_U, strict=True):
            if str(number) != text and (first := held.setdefault(number, text)) != text:
                raise DataError(Problem.TWO_TEXTS, number, first, text)
        if len(held) >= TEXTS_HELD:
            yield held
            held = {}
    yield held


def write_part(path: Path, held: Mapping[int, str]) -> None:
    """Write the texts of some IDs as a file of its own, in the form of ids.parquet. Raises OSError."""
    write_buckets(path, TEXTS, by_bucket(table_of_texts(held)))


def _merge(parts: list[RunPath], folder: RunPath) -> None:
    """Merge the parts into `folder`/ids.parquet, which is there when it is complete."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_opened(part)) for part in sorted(parts, key=str)]
        path = stack.enter_context(replaced_file(stack.enter_context(written_locally(folder)) / IDS_FILE))
        of_buckets = ([file.read_row_group(bucket) for file in files] for bucket in range(BUCKETS))
        two_texts = partial(DataError, Problem.TWO_TEXTS)
        write_buckets(path, TEXTS, (merged_names(tables, two_texts) for tables in of_buckets))


def _named(path: RunPath, keys: Iterable[int]) -> dict[int, str]:
    """Find the names of those of the keys that are in a file of names by key; reads the row groups that they are in.

    Raises DataError.
    """
    wanted_U = np.array(sorted(each for each in set(keys) if -(2**63) <= each < 2**63), np.int64)
    found: dict[int, str] = {}
    try:
        with _opened(path) as file:
            for bucket in np.unique(buckets_of(wanted_U)).tolist():
                table = file.read_row_group(bucket)
                found |= _entries(table.take(np.flatnonzero(np.isin(table.column(0).to_numpy(), wanted_U))))
    except (pa.ArrowException, OSError) as failure:
        raise DataError(Problem.DICTIONARY_DAMAGED, path, str(failure).strip()) from failure
    return found


def _entries(table: pa.Table) -> list[tuple[int, str]]:
    names: Any = table.column(1).cast(pa.binary()).to_pylist()
    keys = cast("list[int]", table.column(0).to_pylist())
    return list(zip(keys, (name.decode(errors="replace") for name in names), strict=True))


def _opened(path: RunPath) -> pq.ParquetFile:
    try:
        source: Any = open_file(path) if isinstance(path, RemotePath) else path
        file = pq.ParquetFile(source, page_checksum_verification=True)
    except (pa.ArrowException, OSError, StorageError) as failure:
        raise DataError(Problem.NOT_PARQUET, path, str(failure).strip()) from failure
    if file.num_row_groups != BUCKETS or file.schema_arrow.types != TEXTS.types:
        raise DataError(Problem.NOT_A_DICTIONARY, path)
    return file
