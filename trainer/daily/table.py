"""The table of a daily job: what its runs' folders say, as JSON, as Parquet and on the screen."""

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from featurestore.console.output import print_table, text_console
from featurestore.errors import StorageError
from featurestore.published.paths import RunPath, run_path, write_file, write_json_file
from trainer.config.config import load_saved
from trainer.daily import SHARED
from trainer.errors import ConfigError, TrainerError
from trainer.runs.folder import report_of

if TYPE_CHECKING:
    import pyarrow as pa

DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
_METRICS = ("impressions", "logloss", "auc", "gauc", "new_ad_auc", "new_ad_gauc")


def runs(folder: RunPath) -> list[RunPath]:
    """List the folders of the days that were trained to the end, oldest first."""
    return [each for each in day_folders(folder) if report_of(each) is not None]


def day_folders(folder: RunPath) -> list[RunPath]:
    """List the folders of the days that have begun, oldest first; none where there is no such folder."""
    below: list[RunPath] = sorted(folder.iterdir(), key=str) if folder.is_dir() else []
    return [each for each in below if DAY.fullmatch(each.name)]


def run_of_days(folder: RunPath) -> RunPath:
    """Return the newest evaluated run of a daily job's folder, or the folder where it is another's.

    Raises ConfigError where no day is evaluated yet.
    """
    if not (folder / SHARED).is_file():
        return folder
    evaluated = [run for run in runs(folder) if (report_of(run) or {})["metrics"]]
    if not evaluated:
        raise ConfigError(
            f"no day of {folder} is evaluated yet; wait for the samples of the next day, or name a run, as {folder}/DAY"
        )
    return evaluated[-1]


def rows(folder: RunPath) -> list[dict[str, Any]]:
    """List the trained days, oldest first, with the columns of `_schema`; None where a day is not evaluated yet.

    `samples_changed`: between its training and its evaluation; only the metrics of new ads may be others by that.
    """
    return [_row(run, report_of(run) or {}) for run in runs(folder)]


def write(folder: RunPath) -> None:
    """Write `folder`/days.json and days.parquet, each replaced as a whole.

    Raises TrainerError where the disk refuses.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    found, parquet = rows(folder), io.BytesIO()
    pq.write_table(pa.Table.from_pylist(found, schema=_schema()), parquet)
    try:
        write_json_file(folder / "days.json", found)
        write_file(folder / "days.parquet", parquet.getvalue())
    except (OSError, StorageError) as failure:
        raise TrainerError(f"cannot write the table of days to {folder}: {failure}") from failure


def show(folder: RunPath) -> None:
    """Print the table."""
    console = text_console()
    table = Table(title=str(folder))
    for name in ("day", "from", "snapshot", "steps", "test day", *_METRICS):
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows(folder):
        before = run_path(row["warm_start"]).name if row["warm_start"] else None
        cells = [row["day"], before, row["store_version"], row["steps"], row["test_day"]]
        table.add_row(*(_text(cell) for cell in [*cells, *(row[name] for name in _METRICS)]))
    print_table(console, table)
    for row in rows(folder):
        if row["samples_changed"]:
            console.print(f"{row['day']}: its training samples had changed before it was evaluated")
    console.print(f"written to {folder / 'days.json'} and days.parquet")


def _schema() -> "pa.Schema":
    import pyarrow as pa

    return pa.schema(
        {
            "day": pa.string(),
            "train_days": pa.list_(pa.string()),
            "steps": pa.int64(),
            "warm_start": pa.string(),
            "store_version": pa.int64(),
            "store_id": pa.string(),
            "commit_id": pa.string(),
            "samples_changed": pa.bool_(),
            "test_day": pa.string(),
            "impressions": pa.int64(),
            **{name: pa.float64() for name in _METRICS[1:]},
        }
    )


def _row(run: RunPath, report: Mapping[str, Any]) -> dict[str, Any]:
    config = load_saved(run / "config.yaml")
    first_store: dict[str, Any] = next(iter(report.get("stores", {}).values()), {})
    return {
        "day": run.name,
        "train_days": config.data.train_days,
        "steps": report["global_step"],
        "warm_start": config.run.warm_start,
        "store_version": report["store_version"],
        **{name: first_store.get(name) or None for name in ("store_id", "commit_id")},
        "samples_changed": report.get("samples_changed", False),
        "test_day": config.data.test_days[0] if config.data.test_days and report["metrics"] else None,
        **{name: report["metrics"].get(name) for name in _METRICS},
    }


def _text(value: str | int | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
