"""A run's schema with its statistics: those of the checkpoint that it continues, else of its training samples."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from featurestore.lookup.cache import SAMPLES, default_cache_dir
from featurestore.published.paths import RunPath, write_json_file
from trainer.comm import Comm
from trainer.runs.samples_digest import remember, remembered
from trainer.samples.reader import SampleIndex
from trainer.samples.statistics import FOUND, fields_to_measure, fill_in, measure
from trainer.schema import Schema

FILE = "inputs.json"
"""In a run's folder."""
_METHOD = 1  # another one is counted up, so that what an earlier version remembers is measured again
_REMEMBERED = 16  # of one folder of samples: other days, other schemas
_FEW_ROW_GROUPS = 32


def with_statistics(
    comm: Comm, index: SampleIndex, schema: Schema, samples_digest: str, cache_dir: str | None = None
) -> Schema:
    """Fill in the statistics of the samples of `index`.

    What is measured is kept in the cache folder of rank 0's machine, by the digest of the samples. Every rank calls it.
    Raises DataError on all ranks together."""
    fields = fields_to_measure(schema)
    if not fields:
        return schema
    asked = [_METHOD, samples_digest, [field.model_dump(mode="json") for field in fields]]
    key = xxhash.xxh3_128_hexdigest(json.dumps(asked, sort_keys=True).encode())
    name = f"{xxhash.xxh3_64_hexdigest(index.storage.url.encode())}-inputs.json"
    file = Path(cache_dir or default_cache_dir()) / SAMPLES / name
    found: dict[str, Any] | None = comm.on_rank_0(lambda: remembered(file).get(key))
    if found is not None:
        return fill_in(schema, found)
    found = measure(comm, index, schema)
    kept = {**remembered(file), key: found}
    comm.on_rank_0(lambda: remember(file, dict(list(kept.items())[-_REMEMBERED:])))
    return fill_in(schema, found)


def with_rough_statistics(comm: Comm, index: SampleIndex, schema: Schema) -> Schema:
    """Fill in the statistics of a few row groups: for what looks at the cost of a run and not at its figures."""
    few = replace(index, row_groups=index.row_groups[:_FEW_ROW_GROUPS])
    return fill_in(schema, measure(comm, few, schema))


def statistics_of(schema: Schema) -> dict[str, dict[str, Any]]:
    """List mean, std and boundaries by field, of the fields that have any."""
    named = {f.name: f.model_dump(mode="json", include=set(FOUND), exclude_none=True) for f in schema.fields}
    return {name: values for name, values in named.items() if values}


def write_statistics(folder: RunPath, schema: Schema, origin: Mapping[str, Any]) -> None:
    """Write inputs.json for people and other programs, where there are statistics, in the place of an earlier run's.

    Runs read their checkpoint's statistics."""
    fields = statistics_of(schema)
    if not fields:
        (folder / FILE).unlink(missing_ok=True)
        return
    values = {"samples_digest": origin["samples_digest"], "fields": fields}
    write_json_file(folder / FILE, values)
