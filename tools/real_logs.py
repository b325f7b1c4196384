"""Real logs of several kinds in the form that jobs/build_samples.py reads: impressions, behaviours and a mapping.

Users bring their own files, named as their publishers name them. Where a log has ratings, a rating is an impression,
and a click if it is 4 or more. Where a log has only what users took, some impressions without a click are drawn for
each: items that others took at about the same time, so that neither the popularity of an item nor the time tells the
label. The behaviours of a user are what he or she liked or took before.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from featurestore.console.commandline import CommandApp, run_app
from featurestore.errors import UserError

LIKED = 4
PAUSE_S, MOST_IN_SESSION = 1800, 20
NEARBY = 1000
"""Rows before and after, in order of time, of which items without a click are drawn."""
DAY_S = 86_400
JOURNEY_END = datetime(2017, 1, 29)
FRAPPE_START_S, FRAPPE_DAYS = 1_420_070_400, 20
CHECKINS_START_S = 1_333_238_400
SPREAD_START_S = 1_499_990_400
BEHAVIOR = ("timestamp", "user", "item", "image", "category")
EXAMPLES = """Examples:
  python tools/real_logs.py movielens ml-100k --out logs/ml
  python tools/real_logs.py checkins nyc --out logs/nyc --days 40 --newest 170000
  crossmedia samples --logs logs/ml --mapping logs/ml/mapping.yaml --samples ml/samples --window-days 300
  python -m benchmarks.quality --logs logs/ml --logs logs/frappe
"""

Int = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Events:
    """N events. `label_N`: whether it was liked; None if all are positive, and `drawn` others are drawn for each.

    `of_row`: further columns of the user or of the context, (N,) each. `of_item`: columns of each item by its id,
    `image` and `category` among them.
    """

    user_N: Int
    item_N: Int
    time_N: Int
    session_N: Int
    label_N: Int | None = None
    drawn: int = 0
    of_row: dict[str, Any] = field(default_factory=dict)
    of_item: Mapping[str, Mapping[int, Any]] = field(default_factory=dict)


def sessions(user_N: Int, time_N: Int) -> Int:
    """Number the session of each event, sorted by user and time; a session ends with a pause, or when it is full."""
    starts_N = np.r_[True, (np.diff(user_N) != 0) | (np.diff(time_N) > PAUSE_S)]
    first_N = np.maximum.accumulate(np.where(starts_N, np.arange(len(user_N)), 0))
    starts_N |= (np.arange(len(user_N)) - first_N) % MOST_IN_SESSION == 0
    return np.cumsum(starts_N)


def read(path: Path, delimiter: str = ",", names: list[str] | None = None) -> dict[str, Any]:
    """Read a text table without quotes, or a CSV file with them, into arrays by column."""
    from pyarrow import csv

    reading = csv.ReadOptions(column_names=names, encoding="latin-1" if names else "utf-8")
    parsing = csv.ParseOptions(delimiter=delimiter, quote_char='"' if delimiter == "," else False)
    parsing.invalid_row_handler = lambda _: "skip"
    table = csv.read_csv(path, reading, parsing)
    return {name: table[name].to_numpy() for name in table.column_names}


def by_item(item_M: Any, values: Any) -> dict[int, Any]:
    """Map items to the values of one column."""
    return dict(zip(np.asarray(item_M).tolist(), np.asarray(values).tolist(), strict=True))


def rated(user_N: Any, item_N: Any, time_N: Any, rating_N: Any) -> Events:
    """Make events of ratings, sorted by user, time and item."""
    order_N = np.lexsort((item_N, time_N, user_N))
    user_N, item_N, time_N, rating_N = (np.asarray(each)[order_N] for each in (user_N, item_N, time_N, rating_N))
    label_N = (rating_N >= LIKED).astype(np.int64)
    return Events(user_N=user_N, item_N=item_N, time_N=time_N, session_N=sessions(user_N, time_N), label_N=label_N)


def movielens(folder: Path) -> Events:
    """Read MovieLens-100K: ratings of movies, with posters where there are some."""
    ratings = read(folder / "u.data", "\t", ["user", "item", "rating", "time"])
    genres = [line.partition("|")[0] for line in (folder / "u.genre").read_text("latin-1").split()]
    items = read(folder / "u.item", "|", ["item", "title", "date", "video", "address", *genres])
    bits = sum(items[name].astype(np.int64) << place for place, name in enumerate(genres))
    users = read(folder / "u.user", "|", ["user", "age", "gender", "occupation", "zip"])
    events = rated(ratings["user"], ratings["item"], ratings["time"], ratings["rating"])
    place_N = np.searchsorted(users["user"], events.user_N)
    of_row = {name: users[name][place_N] for name in ("gender", "occupation")}
    of_row |= {"age": users["age"][place_N] // 10, "scene": events.time_N // 3600 % 24 // 6}
    return replace(events, of_row=of_row, of_item={"category": by_item(items["item"], bits)} | posters(folder))


def movielens_small(folder: Path) -> Events:
    """Read MovieLens latest-small: ratings of movies over 22 years, with posters where there are some."""
    ratings, movies = read(folder / "ratings.csv"), read(folder / "movies.csv")
    events = rated(ratings["userId"], ratings["movieId"], ratings["timestamp"], ratings["rating"])
    return replace(events, of_item={"category": by_item(movies["movieId"], movies["genres"])} | posters(folder))


def posters(folder: Path) -> dict[str, dict[int, str]]:
    """Name the pictures of the items that have one, MOVIE.jpg in the folder posters."""
    images = {int(file.stem): file.name for file in (folder / "posters").glob("*.jpg")}
    return {"image": images} if images else {}


def grocery(folder: Path) -> Events:
    """Read Amazon's groceries as ReChorus has them: what users reviewed, by day."""
    rows, items = read(folder / "train.csv", "\t"), read(folder / "item_meta.csv", "\t")
    order_N = np.argsort(rows["time"], kind="stable")
    user_N, item_N, time_N = (rows[name][order_N] for name in ("user_id", "item_id", "time"))
    of_item = {"category": by_item(items["item_id"], items["i_category"])}
    return Events(user_N=user_N, item_N=item_N, time_N=time_N, session_N=time_N // DAY_S, drawn=3, of_item=of_item)


def frappe(folder: Path) -> Events:
    """Read Frappe: apps that users opened, in which contexts. It has no times; an order is drawn, over some days."""
    rows, apps = read(folder / "frappe.csv", "\t"), read(folder / "meta.csv", "\t")
    count = len(rows["user"])
    order_N = np.random.default_rng(0).permutation(count)
    contexts = ("daytime", "weekday", "homework", "cost", "weather", "country", "city")
    return Events(
        user_N=rows["user"][order_N],
        item_N=rows["item"][order_N],
        time_N=FRAPPE_START_S + np.arange(count) * FRAPPE_DAYS * DAY_S // count,
        session_N=np.arange(count),
        drawn=2,
        of_row={name: rows[name][order_N] for name in contexts},
        of_item={name: by_item(apps["item"], apps[name]) for name in ("category", "developer", "price")},
    )


def checkins(folder: Path) -> Events:
    """Read Foursquare's check-ins in New York as STAN has them: users, places, minutes, and where each place is."""
    visits_N3, places_M3 = np.load(folder / "NYC.npy").astype(np.int64), np.load(folder / "NYC_POI.npy")
    user_N, item_N, minute_N = visits_N3[np.argsort(visits_N3[:, 2], kind="stable")].T
    cells = [f"{latitude:.2f} {longitude:.2f}" for _, latitude, longitude in places_M3.tolist()]
    return Events(
        user_N=user_N,
        item_N=item_N,
        time_N=CHECKINS_START_S + 60 * minute_N,
        session_N=np.arange(len(user_N)),
        drawn=2,
        of_row={"hour": minute_N // 60 % 24, "weekday": minute_N // 1440 % 7},
        of_item={"category": by_item(places_M3[:, 0].astype(np.int64), cells)},
    )


def journey(folder: Path) -> Events:
    """Read The Complete Journey: what households bought in the first four weeks of a year, by basket."""
    import pyarrow.parquet as pq

    rows: Any = pq.read_table(folder / "transactions.parquet", filters=[("transaction_timestamp", "<", JOURNEY_END)])
    rows = rows.sort_by([("transaction_timestamp", "ascending"), ("basket_id", "ascending")])
    users = {row["household_id"]: row for row in pq.read_table(folder / "demographics.parquet").to_pylist()}
    goods: Any = pq.read_table(folder / "products.parquet")
    names = {"category": "product_category", "department": "department", "maker": "manufacturer_id"}
    known = [users.get(user, {}) for user in rows["household_id"].to_pylist()]
    of_row: dict[str, Any] = {name: [row.get(name) or "" for row in known] for name in ("age", "income")}
    return Events(
        user_N=rows["household_id"].to_numpy(),
        item_N=rows["product_id"].to_numpy(),
        time_N=rows["transaction_timestamp"].to_numpy().astype("datetime64[s]").astype(np.int64),
        session_N=rows["basket_id"].to_numpy(),
        drawn=3,
        of_row=of_row | {"store": rows["store_id"].to_numpy()},
        of_item={name: by_item(goods["product_id"], goods[column]) for name, column in names.items()},
    )


def spread(events: Events, days: int) -> Events:
    """Give all days about as many events, in their order: thousands of small days take minutes to build."""
    times, counts = np.unique(events.time_N, return_counts=True)
    share = (np.cumsum(counts) - counts) / counts.sum()
    place_N = np.searchsorted(times, events.time_N)
    return replace(events, time_N=SPREAD_START_S + (share[place_N] * days * DAY_S).astype(np.int64))


READERS = movielens, movielens_small, grocery, frappe, checkins, journey
KINDS: Mapping[str, Callable[[Path], Events]] = {read.__name__.replace("_", "-"): read for read in READERS}
Kind = StrEnum("Kind", list(KINDS))  # type: ignore[misc]


def impressions_of(events: Events) -> tuple[Int, Int, Int]:
    """List the event, item and label of each of M impressions; leave out a drawn item that its session took."""
    count = len(events.user_N)
    if events.label_N is not None:
        return np.arange(count), events.item_N, events.label_N
    random = np.random.default_rng(0)
    row_M = np.repeat(np.arange(count), 1 + events.drawn)
    label_M = (np.arange(len(row_M)) % (1 + events.drawn) == 0).astype(np.int64)
    away_M = random.integers(1, NEARBY + 1, len(row_M)) * random.choice([-1, 1], len(row_M))
    other_M = np.clip(row_M + away_M, 0, count - 1)
    item_M = events.item_N[np.where(label_M == 1, row_M, other_M)]
    _, session_N = np.unique(np.stack([events.user_N, events.session_N], 1), axis=0, return_inverse=True)
    first_N = session_N.ravel() * (1 + events.item_N.max())  # of the numbers of a session's items
    kept_M = (label_M == 1) | ~np.isin(first_N[row_M] + item_M, first_N + events.item_N)
    return row_M[kept_M], item_M[kept_M], label_M[kept_M]


def tables_of(events: Events) -> tuple[Any, Any]:
    """Make the tables of impressions and behaviours."""
    import pyarrow as pa

    row_M, item_M, label_M = impressions_of(events)
    shown: dict[str, Any] = {"timestamp": events.time_N[row_M], "user": events.user_N[row_M], "item": item_M}
    for name, of in {"image": {}, **events.of_item}.items():
        shown[name] = [str(of.get(item, "")) for item in item_M.tolist()]
    liked = pa.table({name: shown[name] for name in BEHAVIOR}).filter(pa.array(label_M == 1))
    for name, values_N in {"session": events.session_N, **events.of_row}.items():
        shown[name] = np.asarray(values_N)[row_M]
    return pa.table(shown | {"label": label_M}), liked


def mapping_of(events: Events) -> dict[str, Any]:
    """Make the mapping: which columns are of the user or the context, and which are of the ad."""
    ours = ["session", "category", *({"scene"} & events.of_row.keys())]
    sides = {"user": events.of_row, "ad": events.of_item}
    more = {side: {name: "id" for name in of if name not in (*ours, "image")} for side, of in sides.items()}
    shown = {"columns": {name: name for name in ours}, **more}
    return {"impressions": shown, "behaviors": {"columns": {"category": "category"}}}


def main(
    kind: Annotated[Kind, typer.Argument(help="Which log it is.")],
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Where its files are.")],
    out: Annotated[Path, typer.Option(help="Folder for impressions/, behaviors/ and mapping.yaml.")],
    days: Annotated[int | None, typer.Option(help="Spread the events evenly over this many days.", min=3)] = None,
    newest: Annotated[int | None, typer.Option(help="Keep the newest impressions only, so many.", min=1)] = None,
) -> None:
    """Write impression and behaviour logs of a real log, and their mapping."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import yaml

    try:
        events = KINDS[kind.value](folder)
        events = spread(events, days) if days else events
        shown, liked = tables_of(events)
        shown = shown.sort_by("timestamp").slice(max(0, len(shown) - newest)) if newest else shown
        for name, table in (("impressions", shown), ("behaviors", liked)):
            (out / name).mkdir(parents=True, exist_ok=True)
            pq.write_table(table, out / name / f"{name}.parquet")
        (out / "mapping.yaml").write_text(yaml.safe_dump(mapping_of(events), sort_keys=False))
    except (OSError, KeyError, ValueError, pa.ArrowException) as failure:
        raise UserError(f"{folder} does not hold the files of a {kind.value} log: {failure}") from failure
    typer.echo(f"{len(shown):,} impressions and {len(liked):,} behaviours in {out}")


app = CommandApp(rich_markup_mode="rich")
app.command(epilog=EXAMPLES)(main)

if __name__ == "__main__":
    run_app(app)
