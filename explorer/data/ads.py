"""What test samples say of images as ads: impressions, clicks, category and price; kept as one file per set of samples.

Letters of shapes: I different images of ads, N impressions.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from explorer.data.background import Background, Task
from explorer.data.cache import TableCache, about_of, described, digest_of
from explorer.data.runs.folders import trained_runs
from explorer.errors import ExplorerError
from explorer.places import Places
from explorer.problems import Problem
from featurestore.errors import UserError
from featurestore.keys import Int64Array
from featurestore.storage.storage import Storage
from featurestore.text import one_line
from trainer.config import load_saved
from trainer.runs.folder import finished

if TYPE_CHECKING:
    from trainer.runs.saved import SavedRun
    from trainer.samples.index import SampleIndex
    from trainer.schema.fields import Schema

MOST_IMPRESSIONS = 2_000_000
"""Most impressions to read; of more, row groups are left out evenly."""
_WHOLE = re.compile(r"-?\d{1,19}")
_FILES = TableCache("ads-", most=32)


@dataclass(frozen=True, kw_only=True)
class AdFigures:
    """Figures of the images of ads, keys ascending."""

    keys_I: Int64Array
    impressions_I: Int64Array
    clicks_I: Int64Array
    category_I: NDArray[Any]
    """Texts; empty where the samples have no category."""
    price_I: NDArray[np.float64]
    """Mean price; NaN where the samples have none."""
    note: str = ""
    """What could not be counted, or only in part."""

    def places(self, keys_N: Int64Array) -> NDArray[np.int32]:
        """Find the row of each image here, (N,); the one after the last row for an image that is not here."""
        place_N = np.searchsorted(self.keys_I, keys_N)
        is_here_N = place_N < len(self.keys_I)
        is_here_N[is_here_N] = self.keys_I[place_N[is_here_N]] == keys_N[is_here_N]
        return np.where(is_here_N, place_N, len(self.keys_I)).astype(np.int32)

    def of(self, keys_N: Int64Array) -> "AdFigures":
        """Return the figures of these images, in their order; without impressions for those that are not there."""
        place_N = self.places(keys_N)
        return AdFigures(
            keys_I=keys_N,
            impressions_I=np.append(self.impressions_I, 0)[place_N],
            clicks_I=np.append(self.clicks_I, 0)[place_N],
            category_I=np.append(self.category_I, "")[place_N],
            price_I=np.append(self.price_I, np.nan)[place_N],
            note=self.note,
        )

    @property
    def ctrs(self) -> NDArray[np.float32]:
        """Click-through rates, (I,); NaN without impressions."""
        with np.errstate(invalid="ignore"):
            return (self.clicks_I / self.impressions_I).astype(np.float32)

    @property
    def size_bytes(self) -> int:
        """The memory that they take, roughly."""
        return 100 * len(self.keys_I)

    def to_table(self) -> pa.Table:
        """Write them as a table of the cache."""
        columns = {name: pa.array(values) for name, values in self.__dict__.items() if name != "note"}
        columns["category_I"] = pa.array(self.category_I, pa.string())
        table = pa.table(columns)
        return table.cast(described(table.schema, self.note))

    @classmethod
    def of_table(cls, table: pa.Table) -> "AdFigures":
        """Read what `to_table` wrote."""
        columns: dict[str, Any] = {name: table[name].to_numpy() for name in table.column_names}
        return cls(**columns, note=about_of(table))


def nothing_known(note: str) -> AdFigures:
    """Return the figures of no image."""
    empty, texts = np.empty(0, np.int64), np.empty(0, object)
    return AdFigures(
        keys_I=empty, impressions_I=empty, clicks_I=empty, category_I=texts, price_I=np.empty(0), note=note
    )


def begin(places: Places, background: Background) -> Task[AdFigures]:
    """Start to read the figures of the shown samples, by the schema of any run on them, or return the task of before.

    A task without runs or samples gives figures of no image, whose note says why. The run is opened in the task: that
    imports torch, and the page would wait for it.
    """
    try:
        run = next((run.name for run in trained_runs(places)), None)
        if run is None:
            raise ExplorerError(Problem.NEEDS_RUNS)
        data = load_saved(places.run(run) / "config.yaml").data
        checkpoints = [each.name for each in finished(places.run(run))]
    except UserError as error:
        note = one_line(error)
        return background.task(repr(("ads", note)), lambda task: nothing_known(note))
    name = repr(("ads", run, data, checkpoints, _test_files(places.samples or data.samples)))
    return background.task(name, lambda task: _of_run(places, run, task))


def _of_run(places: Places, name: str, task: Task[Any]) -> AdFigures:
    from trainer.runs.saved import read_run

    try:
        return ad_figures(read_run(places.run(name), None, places.samples), places.samples, task)
    except UserError as error:
        return nothing_known(one_line(error))


def ad_figures(saved: "SavedRun", samples: str | None, task: Task[Any]) -> AdFigures:
    """Count the test samples of a run, or of `samples`, or read the cached figures; the note says what went wrong."""
    from trainer.comm import SoloComm
    from trainer.runs.saved import open_test

    def counted() -> Iterator[pa.Table]:
        task.tell("reads the test samples")
        index = open_test(SoloComm(), saved.config, saved.schema, samples)
        found = count_ads(index, saved.schema)
        yield replace(found, category_I=_named(found.category_I, saved, index.storage)).to_table()

    try:
        return AdFigures.of_table(_FILES.get(digest_of(_made_of(saved, samples)), counted))
    except UserError as error:
        return nothing_known(Problem.NO_CTR.of(one_line(error)))


def _named(category_I: NDArray[Any], saved: "SavedRun", samples: Storage) -> NDArray[Any]:
    """Write categories as the logs do: hashes as the texts that they were made of, (I,)."""
    names = {text: text for text in set(category_I)}
    hashes = {int(text) for text in names if _WHOLE.fullmatch(text)}
    names |= {str(number): text for number, text in saved.texts_of(hashes, samples).items()}
    return np.array([names[text] for text in category_I], object)


def _made_of(saved: "SavedRun", samples: str | None) -> list[Any]:
    """Return what figures depend on: the files of the test samples, which may change in place, and their columns."""
    files = _test_files(samples or saved.config.data.samples)
    days = None if samples else saved.config.data.test_days
    return [files, days, [(each.name, each.column_name) for each in saved.schema.fields], saved.schema.label]


def _test_files(folder: str) -> tuple[Any, ...]:
    """Return the folder of samples, and name, size and time of its test files on a disk."""
    files = sorted(Path(folder).glob("test/*.parquet"))
    return folder, [(each.name, each.stat().st_size, each.stat().st_mtime_ns) for each in files]


def count_ads(index: "SampleIndex", schema: "Schema") -> AdFigures:
    """Count impressions and clicks of each ad image; its category is that of its last impression, its price the mean.

    Reads in pieces. Without ad images in the schema there are none. Raises DataError, SchemaError.
    """
    from trainer.evaluation.predict import ad_image_field
    from trainer.samples.columns import decode, rules_of, source_columns
    from trainer.samples.index import read_row_groups

    image = ad_image_field(schema)
    if image is None:
        return nothing_known("The samples have no pictures of ads.")
    category, price = _column_named(schema, "category"), _column_named(schema, "price", "preis")
    rules = {name: rule for name, rule in rules_of(schema).items() if name in (schema.label, image.column_name)}
    names = list(dict.fromkeys([*source_columns(rules), *(each for each in (category, price) if each)]))
    every = max(1, -(-index.num_samples // MOST_IMPRESSIONS))
    parts = []
    for row_group, table in read_row_groups(index.storage, index.row_groups[::every], names):
        file = index.storage.full(row_group.file)
        columns = decode(table, rules, schema.label, file, row_group.first_row).columns
        keys_N, label_N = columns[image.column_name].values, columns[schema.label].values
        count = len(keys_N)
        price_N: Any = pc.fill_null(_values(table, price, count, pa.float64()), np.nan)
        is_known_N: Any = pc.is_finite(price_N)
        figures: dict[str, Any] = {
            "key": keys_N,
            "impressions": np.ones(count, np.int64),
            "clicks": label_N.astype(np.int64),
            "category": pc.fill_null(_values(table, category, count, pa.string()), ""),
            "prices": pc.if_else(is_known_N, price_N, 0.0),
            "priced": is_known_N.cast(pa.int64()),
        }
        parts.append(_summed(pa.table(figures)))
    if not parts:
        return nothing_known("")
    summed = _summed(pa.concat_tables(parts))
    numbers: dict[str, Any] = {name: summed[name].to_numpy() for name in summed.column_names}
    with np.errstate(invalid="ignore"):
        price_I = numbers["prices"] / numbers["priced"]
    return AdFigures(
        keys_I=numbers["key"],
        impressions_I=numbers["impressions"],
        clicks_I=numbers["clicks"],
        category_I=numbers["category"],
        price_I=price_I,
        note=f"CTRs are of about {MOST_IMPRESSIONS:,} of the test impressions." if every > 1 else "",
    )


def _column_named(schema: "Schema", *words: str) -> str | None:
    """Find the column of ads whose name has one of some words, in small or capital letters, one value for each ad."""
    of_ads = [field for field in schema.fields if field.side == "ad" and field.kind in ("id", "dense")]
    names = [each.column_name for each in of_ads if not each.columns]
    return next((name for name in names if any(word in name.lower() for word in words)), None)


def _values(table: pa.Table, name: str | None, count: int, kind: Any) -> Any:
    """Read a column of ads as it is in the file, one value an impression; nulls if it has others."""
    values: Any = table[name].combine_chunks() if name else pa.nulls(0)
    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        values = values.flatten()
    return values.cast(kind) if len(values) == count else pa.nulls(count, kind)


_HOW: dict[str, Any] = {"impressions": "sum", "clicks": "sum", "category": "last", "prices": "sum", "priced": "sum"}


def _summed(rows: pa.Table) -> pa.Table:
    """Sum up the figures of each image, and take its last category; keys ascending."""
    found = rows.group_by("key", use_threads=False).aggregate(list(_HOW.items()))
    columns: dict[str, Any] = {name: found[f"{name}_{how}"] for name, how in _HOW.items()}
    return pa.table(columns | {"key": found["key"]}).sort_by("key")
