"""The raw logs of a demo, one Parquet file a day, and the truth behind them as JSON."""

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.demo import truth
from pipeline.demo.catalogue import IntArray
from pipeline.demo.oracle import ceilings, variance_shares
from pipeline.demo.simulate import World

# Users, items and categories have numbers as a shop would give them, not positions in an array.
FIRST_USER, FIRST_ITEM, FIRST_CATEGORY, FIRST_SESSION = 100_001, 500_001, 11, 1
FIRST_OFFER = 1_000_001  # item IDs of what sellers offer, with taste=pictures
DEMO_FILE = "demo.json"
LOGS = ("impressions", "behaviors")


def day_name(start_s: int, day: int) -> str:
    """Give the ISO date of a day of the log (UTC)."""
    moment = datetime.datetime.fromtimestamp(start_s + day * truth.DAY_S, tz=datetime.UTC)
    return moment.date().isoformat()


def log_files(out: Path, start_s: int, num_days: int) -> list[Path]:
    """List the files that `write_logs` writes: impressions of the days, behaviours of the history too."""
    first = {"impressions": 0, "behaviors": -truth.HISTORY_DAYS}
    return [
        out / "logs" / log / f"day={day_name(start_s, day)}.parquet"
        for log in LOGS
        for day in range(first[log], num_days)
    ]


def offer_uri(uri: str, seller: int) -> str:
    """Name the image of a seller, of an item that others offer with equal pictures: shape/item-00012-07.jpg."""
    return f"{uri.removesuffix('.jpg')}-{seller:02d}.jpg"


def write_logs(world: World, out: Path) -> None:
    """Write impressions and behaviours below `out`/logs in order of time; a day without rows is an empty file."""
    tables = {"impressions": impressions_table(world), "behaviors": behaviors_table(world)}
    time_of = {"impressions": world.shown.time_N, "behaviors": world.behaviors.time_N}
    for path in log_files(out, world.start_s, world.num_days):
        log, date = path.parent.name, path.stem.removeprefix("day=")
        begin_s = int(datetime.datetime.fromisoformat(date).replace(tzinfo=datetime.UTC).timestamp())
        first, last = np.searchsorted(time_of[log], [begin_s, begin_s + truth.DAY_S])
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(tables[log].slice(int(first), int(last - first)), path)


def impressions_table(world: World) -> pa.Table:
    """Make one row for each ad shown."""
    shown, people = world.shown, world.people
    columns: dict[str, Any] = {
        "timestamp": _timestamps(shown.time_N),
        "user": FIRST_USER + shown.user_N,
        "session": FIRST_SESSION + shown.session_N,
        "scene": shown.scene_N,
        "user_age": people.age_U[shown.user_N],
        "user_gender": people.gender_U[shown.user_N],
        **_item_columns(world, shown.item_N),
        "label": world.clicks.label_N.astype(np.int8),
    }
    return pa.table(columns)


def behaviors_table(world: World) -> pa.Table:
    """Make one row for each organic click."""
    done = world.behaviors
    columns: dict[str, Any] = {
        "timestamp": _timestamps(done.time_N),
        "user": FIRST_USER + done.user_N,
        **(_item_columns(world, done.item_N) if world.taste == "items" else _offer_columns(world)),
        "dwell_s": done.dwell_s_N,
    }
    return pa.table(columns)


def describe_truth(world: World) -> dict[str, Any]:
    """Collect what the simulation knows and the logs do not say: parts of the logit, ceilings, counts."""
    last = world.shown.day_N == world.num_days - 1
    new_T = world.launch_day_I[world.shown.item_N[last]] == world.num_days - 1
    shares = variance_shares(world)
    return {
        "first_day": day_name(world.start_s, 0),
        "test_day": day_name(world.start_s, world.num_days - 1),
        "counts": {
            "items": world.catalogue.num_items,
            "categories": len(world.catalogue.category_names),
            "users": world.people.num_users,
            "behaviors": len(world.behaviors.time_N),
            "train_impressions": int((~last).sum()),
            "test_impressions": int(last.sum()),
            "new_items": int((world.advertised_I & (world.launch_day_I == world.num_days - 1)).sum()),
        },
        "click_rate": round(float(world.clicks.label_N.mean()), 4),
        "new_ad_share_of_test": round(float(new_T.mean()), 4) if len(new_T) else 0.0,
        "logit": {
            name: {"sd": sd, "share_of_variance": round(shares[name], 4), "where": truth.WHERE[name]}
            for name, sd in truth.LOGIT_PARTS.items()
        },
        "look": {
            name: round(float(weight), 3)
            for name, weight in zip(world.catalogue.look_names, world.catalogue.weight_K, strict=True)
        },
        "oracle": ceilings(world),
        "oracle_means": truth.ORACLE_MEANS,
        "categories": {name: FIRST_CATEGORY + index for index, name in enumerate(world.catalogue.category_names)},
    }


def _timestamps(time_N: IntArray) -> Any:
    return pa.array(time_N * 1_000_000, type=pa.int64()).cast(pa.timestamp("us", tz="UTC"))


def _item_columns(world: World, item_N: IntArray) -> dict[str, Any]:
    return {
        "item": FIRST_ITEM + item_N,
        "image": [world.catalogue.uris[item] for item in item_N],
        "category": FIRST_CATEGORY + world.catalogue.category_I[item_N],
    }


def _offer_columns(world: World) -> dict[str, Any]:
    """Make the columns of `_item_columns` for what sellers offer."""
    item_N, seller_N = world.behaviors.item_N, world.behaviors.seller_N
    uris = [offer_uri(uri, seller) for uri in world.catalogue.uris for seller in range(truth.SELLERS)]
    offer_N = item_N * truth.SELLERS + seller_N
    return _item_columns(world, item_N) | {"item": FIRST_OFFER + offer_N, "image": [uris[offer] for offer in offer_N]}
