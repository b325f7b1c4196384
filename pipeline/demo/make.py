"""A demo data set in a folder: pictures, logs, and the truth in demo.json. Equal options give equal bytes."""

import contextlib
import datetime
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from featurestore.console.files import write_json
from featurestore.storage.local import read_regular
from featurestore.text import parse_json
from pipeline.demo import truth
from pipeline.demo.catalogue import Catalogue
from pipeline.demo.draw import SHAPES, Garment, catalogue_of, draw_garment, plan_garments
from pipeline.demo.options import DemoOptions
from pipeline.demo.simulate import advertised, simulate
from pipeline.demo.write import DEMO_FILE, LOGS, describe_truth, log_files, offer_uri, write_logs
from pipeline.errors import DemoError

FIRST_DAY = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)
START_S = int(FIRST_DAY.timestamp())
MAX_LISTED = 20  # unreadable photographs in demo.json
FORMAT = 1  # raise it when equal options no longer give equal pictures and logs
DRAWN_NAME = re.compile(r"item-\d{5}(-\d\d)?\.jpg")
LOG_NAME = re.compile(r"day=\d{4}-\d\d-\d\d\.parquet")

Progress = Callable[[int], None]


@dataclass(frozen=True)
class DemoSummary:
    """What was made (or found made), and where to point the extraction."""

    content: dict[str, Any]  # of demo.json
    images: Path
    already_there: bool


def make_demo(options: DemoOptions, drawn: Progress = lambda count: None) -> DemoSummary:
    """Make pictures, logs and demo.json below `options.out`; `drawn` gets the number of pictures finished.

    Equal options over a finished demo change nothing; over an unfinished one they finish it. A demo made with other
    options is replaced only with `force`, and files that this job did not make are never touched. Raises DemoError,
    SourceError.
    """
    if options.taste == "pictures" and options.images is not None:
        raise DemoError(
            "taste=pictures needs copies of the pictures, and --images copies none; leave one of the two out"
        )
    advertised_I = advertised(options.items, options.seed, options.taste)
    wanted = _parameters(options)
    found = _read_demo(options.out)
    images = options.images.resolve() if options.images else options.out / "images"
    if found and found["parameters"] == wanted and _is_whole(options, found):
        return DemoSummary(found, images, already_there=True)
    garments = plan_garments(options.items, options.seed) if options.images is None else []
    if options.images is None:
        catalogue, notes = catalogue_of(garments), {"duplicates": options.items - len(set(garments))}
    else:
        catalogue, notes = _measure(options.images, options.labels)
    with _os_errors(options.out):
        if found is None:
            _refuse_foreign(options.out)
        elif found["parameters"] != wanted:
            _refuse_other(options, found["parameters"], wanted)
            _remove_own(options.out)
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / DEMO_FILE, {"complete": False, "parameters": wanted})
        if options.images is None:
            _draw(options.out, catalogue.uris, garments, drawn)
            _offer(options.out, [catalogue.uris[item] for item in np.flatnonzero(~advertised_I)])
        world = simulate(catalogue, options.users, options.days, options.seed, START_S, options.taste)
        write_logs(world, options.out)
        content = {"complete": True, "parameters": wanted, "images": str(images), **notes, **describe_truth(world)}
        write_json(options.out / DEMO_FILE, content)
    return DemoSummary(_read_demo(options.out) or content, images, already_there=False)


@contextlib.contextmanager
def _os_errors(out: Path) -> Iterator[None]:
    """Raise DemoError in place of an OSError: a full disk, a folder that cannot be written."""
    try:
        yield
    except OSError as error:
        raise DemoError(f"cannot write the demo to {out}: {error}") from error


def _parameters(options: DemoOptions) -> dict[str, Any]:
    """Collect all that decides the bytes, as it comes back from JSON."""
    parameters: dict[str, Any] = {"format": FORMAT, "users": options.users, "days": options.days, "seed": options.seed}
    if options.taste != "items":
        parameters["taste"] = options.taste
    if options.images is None:
        return parameters | {"items": options.items, "images": None}
    return parameters | {
        "images": str(options.images.resolve()),
        "images_digest": _folder_digest(options.images),
        "labels": str(options.labels.resolve()) if options.labels else None,
        "labels_digest": _file_digest(options.labels) if options.labels else None,
    }


def _folder_digest(images: Path) -> str:
    """Digest a folder of images: it changes when an image comes, goes or changes."""
    from pipeline.images.source import list_images

    digest = xxhash.xxh3_128()
    for ref in list_images(str(images)).images:
        digest.update(f"{ref.uri}\0{ref.source_tag}\0".encode())
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    try:
        return xxhash.xxh3_128(read_regular(path)).hexdigest()
    except OSError as error:
        raise DemoError(f"cannot read the labels {path}: {error.strerror}") from error


def _read_demo(out: Path) -> dict[str, Any] | None:
    """Read the demo.json of `out`; None where there is none."""
    path = out / DEMO_FILE
    try:
        content: dict[str, Any] = parse_json(read_regular(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DemoError(f"cannot read {path}: {error}; remove it, or give another --out") from error
    if not isinstance(content, dict) or not isinstance(content.get("parameters"), dict):
        raise DemoError(f"{path} is not from this job; give another --out")
    return content


def _is_whole(options: DemoOptions, found: dict[str, Any]) -> bool:
    if not found.get("complete"):
        return False
    if not all(path.is_file() for path in log_files(options.out, START_S, options.days)):
        return False
    num_offered = int((~advertised(options.items, options.seed, options.taste)).sum())
    num_images = options.items + truth.SELLERS * num_offered
    return options.images is not None or len(_own_images(options.out)) == num_images


def _refuse_foreign(out: Path) -> None:
    """Raise DemoError where pictures or logs are in the way that no demo.json accounts for."""
    for folder in (out / "images", out / "logs"):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DemoError(f"{folder} is in the way, and was not made by this job: move it, or give another --out")


def _refuse_other(options: DemoOptions, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if not options.force:
        names = sorted(name for name in found | wanted if found.get(name) != wanted.get(name))
        differing = ", ".join(f"{name}: {found.get(name)} there, {wanted.get(name)} wanted" for name in names)
        raise DemoError(
            f"{options.out} has a demo made with other options ({differing}): "
            "give --force to replace it, or another --out"
        )


def _own_images(out: Path) -> list[Path]:
    return [
        path for shape in SHAPES for path in (out / "images" / shape).glob("item-*.jpg") if DRAWN_NAME.match(path.name)
    ]


def _remove_own(out: Path) -> None:
    """Remove the pictures and logs that this job makes, and nothing else."""
    logs = [path for log in LOGS for path in (out / "logs" / log).glob("day=*.parquet") if LOG_NAME.match(path.name)]
    for path in _own_images(out) + logs:
        path.unlink()


def _draw(out: Path, uris: Sequence[str], garments: list[Garment], drawn: Progress) -> None:
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


def _offer(out: Path, uris: Sequence[str]) -> None:
    """Give every seller an image of its own, a hard link where the disk knows them."""
    for uri in uris:
        for seller in range(truth.SELLERS):
            image = out / "images" / offer_uri(uri, seller)
            image.unlink(missing_ok=True)
            try:
                image.hardlink_to(out / "images" / uri)
            except OSError:
                shutil.copyfile(out / "images" / uri, image)


def _measure(images: Path, labels: Path | None) -> tuple[Catalogue, dict[str, Any]]:
    """Measure the photographs as a catalogue; return it, and what demo.json has of those that are not in it."""
    from pipeline.demo.measure import measure_folder

    catalogue, unreadable, num_unlabelled = measure_folder(images, labels)
    if catalogue.num_items < truth.MIN_ITEMS:
        raise DemoError(f"{catalogue.num_items} readable images in {images}: at least {truth.MIN_ITEMS} make a demo")
    listed = dict(unreadable[:MAX_LISTED])
    return catalogue, {"unreadable": listed, "num_unreadable": len(unreadable), "num_unlabelled": num_unlabelled}
