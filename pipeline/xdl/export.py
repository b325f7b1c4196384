"""Sample groups back to XDL's text samples, one line an impression."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.errors import StorageError
from featurestore.storage.storage import Storage
from pipeline.errors import SampleError, SampleOptionError
from pipeline.xdl.fields import WEIGHT_SUFFIX
from pipeline.xdl.line import Line, Part, format_ids, format_line, format_number

_RESERVED_IN_NAMES = "|;@,:"


@dataclass(frozen=True)
class Column:
    """A column of the samples that becomes a field of the user or the ad part."""

    name: str
    part: str  # user | ad
    is_dense: bool
    weights: str | None = None

    @property
    def weights_name(self) -> str:
        """The column with the weights of its ids, where there is one."""
        return self.weights or self.name + WEIGHT_SUFFIX


@dataclass(frozen=True)
class Roles:
    """Columns that are no fields."""

    group: str
    label: str


def export_samples(samples: str, target: str, columns: Iterable[Column], roles: Roles, splits: Iterable[str]) -> int:
    """Writes the groups of `samples`/SPLIT/*.parquet as lines of the file `target`; the number of lines.

    Keys and times are those that an import kept (`skey`, `gkey`, `ad_timestamp`), else made of the group's value and
    `timestamp`; weights are those of the schema's columns for them, or of the `_weight` columns, else 1. Raises
    SampleError, StorageError.
    """
    fields = list(columns)
    if wrong := [each.name for each in fields if set(each.name) & set(_RESERVED_IN_NAMES)]:
        raise SampleError(f"column {wrong[0]}: XDL's text has no way to write a name with one of {_RESERVED_IN_NAMES}")
    storage, path = Storage(str(PurePosixPath(target).parent)), PurePosixPath(target).name
    if "://" in target:
        parent, _, path = target.rpartition("/")
        storage = Storage(parent)
    num_lines = 0
    with storage.open_output(path) as file:
        for group in _groups(samples, splits, fields, roles):
            for line in lines_of(group, fields, roles, num_lines):
                file.write(f"{format_line(line)}\n".encode())
                num_lines += 1
        if not num_lines:
            raise SampleOptionError(f"{samples}: no sample group in {', '.join(splits)}")
    return num_lines


def lines_of(group: Mapping[str, Any], columns: Iterable[Column], roles: Roles, first: int) -> Iterator[Line]:
    """The lines of one row of the samples; `first` numbers those that have no key of their own."""
    columns = list(columns)
    gkey = str(group.get("gkey", group[roles.group]))
    user = _part(group, [each for each in columns if each.part == "user"], None)
    times = group.get("ad_timestamp") or [group.get("timestamp") or 0] * len(group[roles.label])
    for index, label in enumerate(group[roles.label]):
        ad = _part(group, [each for each in columns if each.part == "ad"], index)
        skey = group["skey"][index] if "skey" in group else f"sample{first + index}"
        yield Line(skey, gkey, user, ad, [str(label)], str(times[index]))


def _part(group: Mapping[str, Any], columns: Iterable[Column], index: int | None) -> Part:
    part: Part = {}
    for each in columns:
        value, weights = group[each.name], group.get(each.weights_name)
        if index is not None:
            value, weights = value[index], weights[index] if weights is not None else None
        values = value if isinstance(value, list) else [value]
        if each.is_dense:
            part[each.name] = [format_number(number) for number in values]
        else:
            listed = weights if isinstance(weights, list) or weights is None else [weights]
            part[each.name] = format_ids(values, listed)
    return part


def _groups(samples: str, splits: Iterable[str], columns: list[Column], roles: Roles) -> Iterator[dict[str, Any]]:
    storage = Storage(samples)
    needed = {roles.group, roles.label, *(each.name for each in columns)}
    optional = {"gkey", "skey", "timestamp", "ad_timestamp", *(each.weights_name for each in columns)}
    for split in splits:
        for name in storage.list(split):
            if not name.endswith(".parquet"):
                continue
            where = storage.full(f"{split}/{name}")
            try:
                with closing(pq.ParquetFile(storage.open_input(f"{split}/{name}"))) as file:
                    found = set(file.schema_arrow.names)
                    if missing := sorted(needed - found):
                        raise SampleError(
                            f"{where}: column {missing[0]!r} is missing; is it the schema of these samples?"
                        )
                    for batch in file.iter_batches(1024, columns=sorted(needed | (optional & found))):
                        yield from batch.to_pylist()
            except (pa.ArrowException, OSError, StorageError) as error:
                raise SampleError(f"{where}: cannot be read: {error}") from error
