"""The demo's files: made, and written."""

import datetime
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.console.files import write_json
from featurestore.keys import Int64Array
from featurestore.parsing import parse_json
from featurestore.storage.local import read_regular
from pipeline.demo.items import SHAPES, Garment, catalogue_of, draw_garment, measure_folder, plan_garments
from pipeline.demo.world import DAY_S, HISTORY_DAYS, MIN_ITEMS, START_S, World, ceiling, simulate
from pipeline.errors import DemoError
from pipeline.options import DemoOptions
from pipeline.problems import Problem

FORMAT = 1  # raise it when equal options no longer give equal pictures and logs


@dataclass(frozen=True)
class DemoSummary:
    """Summary of the demo data that was made or found, with the arguments of the extraction."""

    content: dict[str, Any]  # of demo.json
    images: Path
    already_there: bool


def make_demo(
    options: DemoOptions,
    drawn: Callable[[int], None] = lambda count: None,
    doing: Callable[[str], None] = lambda what: None,
) -> DemoSummary:
    """Make pictures, logs and demo.json below `options.out`; `drawn` gets the number of pictures finished.

    `doing` gets what follows them, in words. Equal options over a finished demo change nothing; over an unfinished one
    they finish it. A demo made with other options is replaced only with `force`, and files that this job did not make
    are never touched. Raises DemoError, SourceError.
    """
    wanted = _parameters(options)
    found = _read_demo(options.out)
    images = options.images.resolve() if options.images else options.out / "images"
    if found and found["parameters"] == wanted and _is_whole(options, found):
        return DemoSummary(found, images, already_there=True)
    garments = plan_garments(options.num_items, options.seed) if options.images is None else []
    if options.images is None:
        catalogue, notes = catalogue_of(garments), {"duplicates": options.num_items - len(set(garments))}
    else:
        catalogue, notes = measure_folder(options.images, options.labels)
        if catalogue.num_items < MIN_ITEMS:
            raise DemoError(Problem.TOO_FEW_IMAGES, catalogue.num_items, options.images, MIN_ITEMS)
    try:
        if found is None:
            _refuse_foreign(options.out)
        elif found["parameters"] != wanted:
            if not options.force:
                there = found["parameters"]
                names = sorted(name for name in there | wanted if there.get(name) != wanted.get(name))
                differing = ", ".join(f"{name}: {there.get(name)} there, {wanted.get(name)} wanted" for name in names)
                raise DemoError(Problem.OTHER_DEMO, options.out, differing)
            _remove_own(options.out)
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / DEMO_FILE, {"complete": False, "parameters": wanted})
        if options.images is None:
            _draw(options.out, catalogue.uris, garments, drawn)
        doing("all; simulating users")
        world = simulate(catalogue, options.num_users, options.days, options.seed)
        write_logs(world, options.out)
        content = {"complete": True, "parameters": wanted, "images": str(images), **notes, **describe_truth(world)}
        write_json(options.out / DEMO_FILE, content)
    except OSError as error:
        raise DemoError(Problem.REFUSED, "write the demo to", options.out, error) from error
    return DemoSummary(_read_demo(options.out) or content, images, already_there=False)


def _parameters(options: DemoOptions) -> dict[str, Any]:
    """Collect all that decides the bytes, as it comes back from JSON."""
    parameters: dict[str, Any] = {"format": FORMAT, "users": options.num_users}
    parameters |= {"days": options.days, "seed": options.seed}
    if options.images is None:
        return parameters | {"items": options.num_items, "images": None}
    labels = str(options.labels.resolve()) if options.labels else None
    return parameters | {"images": str(options.images.resolve()), "labels": labels}


def _read_demo(out: Path) -> dict[str, Any] | None:
    """Read the demo.json of `out`; None where there is none."""
    path = out / DEMO_FILE
    try:
        content: dict[str, Any] = parse_json(read_regular(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DemoError(Problem.DEMO_UNREAD, path, error) from error
    if not isinstance(content, dict) or not isinstance(content.get("parameters"), dict):
        raise DemoError(Problem.NOT_A_DEMO, path)
    return content


def _is_whole(options: DemoOptions, found: dict[str, Any]) -> bool:
    if not found.get("complete") or options.images is not None:  # photographs may have changed
        return False
    logs = log_files(options.out, options.days).values()
    return all(path.is_file() for path in logs) and len(_own_images(options.out)) == options.num_items


def _refuse_foreign(out: Path) -> None:
    """Raise DemoError where pictures or logs are in the way that no demo.json accounts for."""
    for folder in (out / "images", out / "logs"):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DemoError(Problem.IN_THE_WAY, folder)


def _own_images(out: Path) -> list[Path]:
    return [path for shape in SHAPES for path in (out / "images" / shape).glob(f"item-{'[0-9]' * 5}.jpg")]


def _remove_own(out: Path) -> None:
    """Remove the pictures and logs that this job makes, and nothing else."""
    logs = [path for log in LOGS for path in (out / "logs" / log).glob("day=[0-9]*-[0-9][0-9]-[0-9][0-9].parquet")]
    for path in _own_images(out) + logs:
        path.unlink()


def _draw(out: Path, uris: Sequence[str], garments: list[Garment], drawn: Callable[[int], None]) -> None:
    """Draw the pictures, in threads: most of the time is spent in Pillow and numpy."""
    for shape in SHAPES:
        (out / "images" / shape).mkdir(parents=True, exist_ok=True)

    def draw(uri: str, garment: Garment) -> None:
        (out / "images" / uri).write_bytes(draw_garment(garment))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for _ in pool.map(draw, uris, garments):
                drawn(1)
        except BaseException:  # Ctrl-C too, while all are still being handed over
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# Users, items and categories have numbers as a shop would give them, not positions in an array.
FIRST_USER, FIRST_ITEM, FIRST_CATEGORY, FIRST_SESSION = 100_001, 500_001, 11, 1
DEMO_FILE = "demo.json"
LOGS = ("impressions", "behaviors")


def day_name(day: int) -> str:
    """Return the ISO date of a day of the log (UTC)."""
    return f"{datetime.datetime.fromtimestamp(START_S + day * DAY_S, datetime.UTC):%Y-%m-%d}"


def log_files(out: Path, num_days: int) -> dict[tuple[str, int], Path]:
    """List the files that `write_logs` writes, by log and day: impressions, and behaviours of the history too."""
    first = {"impressions": 0, "behaviors": -HISTORY_DAYS}
    return {
        (log, day): out / "logs" / log / f"day={day_name(day)}.parquet"
        for log in LOGS
        for day in range(first[log], num_days)
    }


def write_logs(world: World, out: Path) -> None:
    """Write impressions and behaviours below `out`/logs in order of time; a day without rows is an empty file."""
    tables = {"impressions": impressions_table(world), "behaviors": behaviors_table(world)}
    time_of = {"impressions": world.shown.time_N, "behaviors": world.behaviors.time_N}
    for (log, day), path in log_files(out, world.num_days).items():
        first, last = np.searchsorted(time_of[log], [START_S + day * DAY_S, START_S + (day + 1) * DAY_S])
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
        **_item_columns(world, done.item_N),
        "dwell_s": done.dwell_s_N,
    }
    return pa.table(columns)


def describe_truth(world: World) -> dict[str, Any]:
    """Collect facts of the simulation that the logs do not have: the ceiling and counts."""
    last = world.shown.day_N == world.num_days - 1
    new_T = world.launch_day_I[world.shown.item_N[last]] == world.num_days - 1
    return {
        "first_day": day_name(0),
        "test_day": day_name(world.num_days - 1),
        "counts": {
            "items": world.catalogue.num_items,
            "categories": len(world.catalogue.category_names),
            "users": world.people.num_users,
            "behaviors": len(world.behaviors.time_N),
            "train_impressions": int((~last).sum()),
            "test_impressions": int(last.sum()),
            "new_items": int((world.launch_day_I == world.num_days - 1).sum()),
        },
        "click_rate": round(float(world.clicks.label_N.mean()), 4),
        "new_ad_share_of_test": round(float(new_T.mean()), 4) if len(new_T) else 0.0,
        "ceiling": ceiling(world),
        "categories": {name: FIRST_CATEGORY + index for index, name in enumerate(world.catalogue.category_names)},
    }


def _timestamps(time_N: Int64Array) -> Any:
    return pa.array(time_N * 1_000_000, type=pa.int64()).cast(pa.timestamp("us", tz="UTC"))


def _item_columns(world: World, item_N: Int64Array) -> dict[str, Any]:
    return {
        "item": FIRST_ITEM + item_N,
        "image": [world.catalogue.uris[item] for item in item_N],
        "category": FIRST_CATEGORY + world.catalogue.category_I[item_N],
    }
