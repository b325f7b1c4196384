"""The same samples in files of several layouts, and a schema with a number for each sample."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

if TYPE_CHECKING:
    from trainer.schema import Schema

LAYOUTS = ("even", "uneven", "huge", "single")
ROW_GROUP = 128
_IN_FILE, _HUGE = 8, 20


def write_layouts(folder: Path, samples: Path, schema_file: Path, row_groups: int) -> "Schema":
    """Write the samples in each layout, with a number for each sample, unless that was done; returns their schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from trainer.schema import load_schema

    schema = yaml.safe_load(schema_file.read_text())
    schema["fields"].append({"name": "serial", "side": "ad", "kind": "id", "column": "ad_serial"})
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema))
    mark, wanted = folder / "layouts.txt", f"{row_groups}\n"
    if not mark.exists() or mark.read_text() != wanted:
        whole = pq.read_table(samples).combine_chunks()
        labels: Any = whole.column("label").chunk(0)
        whole = whole.append_column(
            "ad_serial", pa.ListArray.from_arrays(labels.offsets, pa.array(np.arange(len(labels.values))))
        )
        for layout in LAYOUTS:
            train = folder / layout / "train"
            shutil.rmtree(train, ignore_errors=True)
            train.mkdir(parents=True)
            at = 0
            for number, sizes in enumerate(files_of(layout, row_groups)):
                with pq.ParquetWriter(train / f"part-{number:05d}.parquet", whole.schema, compression="zstd") as writer:
                    for size in sizes:
                        writer.write_table(whole.slice(at, size), row_group_size=size)
                        at += size
        mark.write_text(wanted)
    return load_schema(folder / "schema.yaml")


def files_of(layout: str, row_groups: int) -> Iterator[list[int]]:
    """Yield for each file the sample groups of its row groups; the sum is the same for every layout."""
    left, draw = row_groups * ROW_GROUP, np.random.default_rng(0)
    first = True
    while left > 0:
        wanted = _IN_FILE * ROW_GROUP
        if layout == "uneven":
            wanted = int(draw.integers(1, 2 * wanted))
        elif layout == "single":
            wanted = ROW_GROUP
        count = min(wanted, left)
        sizes = [min(ROW_GROUP, count - at) for at in range(0, count, ROW_GROUP)]
        if layout == "huge" and first:
            count = min(_HUGE * ROW_GROUP, left)
            sizes = [count]
        yield sizes
        left, first = left - count, False
