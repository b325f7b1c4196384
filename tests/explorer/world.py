"""A small shop for the explorer: pictures with hostile names, a store of five snapshots, samples, runs and a bundle.

Everything is made by the project's own jobs, in seconds and once per session; a test that changes something takes
`World.copy`. The snapshots: the first pictures; some added, changed, removed and copied; three broken; the removed one
comes back; all shards compacted, which changes no picture.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from explorer.places import Places
from featurestore.keys import key_of_uri
from tests.pipeline.conftest import draw_photo, encode_image
from tests.trainer.conftest import Places as Settings
from tests.trainer.conftest import change_column, nothing_drawn, write_samples

if TYPE_CHECKING:
    from distributed import Client

NETWORK = "mobilenet_v3_small:avgpool"
PLAIN = tuple(f"shoes/shoe-{number:02}.jpg" for number in range(12))
HOSTILE = (
    "<script>alert(1)<%2fscript>.png", "<img src=x onerror=alert(2)>.png", "\"quotes' & <b>.png",
    "'onmouseover='alert(3)'.png", "{{ 7 * 7 }} ${7*7} {% raw %}.png", "..hidden..png", "..%2F..%2Fetc%2Fpasswd.png",
    "javascript:alert(4).png", "a b  c?d=e#f;g+h.png", "line\nbreak.png", "\u202egnp.drow.png",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627.png", "\u978b \U0001f45f.png", f"long-{'w' * 240}.png",
)  # fmt: skip
"""Names that a file system takes and a page has to show as they are: as text, and as an address of a picture."""
SCRIPT = "</script><script>alert(1)</script>&\u2028"
"""A text that would end a script in a page and begin another."""
COPIED, COPY = "shoes/shoe-03.jpg", "copies/the same shoe.jpg"
CHANGED, REMOVED, ADDED = "shoes/shoe-01.jpg", "shoes/shoe-02.jpg", ("new/boot-0.jpg", "new/boot-1.jpg")
BROKEN, NO_IMAGE, HOSTILE_BROKEN = "shoes/shoe-04.jpg", "text.jpg", "<b onclick=alert(5)>broken.png"
UNKNOWN = "nobody/knows.jpg"
"""In the samples, and neither in the store nor on the disk."""
PLACES = ("store", "runs", "samples", "images")


class World:
    """The places that the explorer is started with.

    `runs` has `both` and `ids-only`, evaluated, and `both-longer`; `model` the bundle of `both`, version 1 in use.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.images, self.store = folder, folder / "images", folder / "features"
        self.samples, self.runs, self.model = folder / "samples", folder / "runs", folder / "models" / "ctr"

    def places(self, **others: object) -> Places:
        """The places as the explorer has them, without the bundle; some of them others, or None."""
        own = {name: getattr(self, name) for name in PLACES}
        return Places(**{name: place and str(place) for name, place in (own | others).items()})

    def options(self) -> list[str]:
        """The options of `python -m explorer` that name these places, and the bundle."""
        return [word for name in (*PLACES, "model") for word in (f"--{name}", str(getattr(self, name)))]

    def copy(self, folder: Path) -> "World":
        """Copy everything, for a test that changes it; runs and bundle name the store of the first world."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return World(folder)


def draw(folder: Path, name: str, seed: int) -> None:
    """Draw a picture under a name, of the kind that its ending says."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_image(draw_photo(seed, 120, 90), "PNG" if name.endswith(".png") else "JPEG"))


def make_shop(folder: Path, client: "Client") -> World:
    """Make the pictures and the store, in a second."""
    from featurestore.store import FeatureStore
    from featurestore.upkeep.compaction import compact
    from pipeline.features.refresh import extract, refresh
    from pipeline.options import ExtractOptions, RefreshOptions

    world = World(folder)
    images, places = world.images, {"images": str(world.images), "store": str(world.store)}

    def bring_up_to_date() -> None:
        refresh(RefreshOptions(**places), client)

    for seed, name in enumerate((*PLAIN, *HOSTILE)):
        draw(images, name, seed)
    options = {"backbone": NETWORK, "weights": "random:0", "precision": "float32", "num_shards": 4}
    extract(ExtractOptions(**places, **options), client)

    draw(images, CHANGED, 101)
    (images / REMOVED).unlink()
    for seed, name in enumerate(ADDED, 200):
        draw(images, name, seed)
    (images / COPY).parent.mkdir()
    shutil.copy(images / COPIED, images / COPY)
    bring_up_to_date()

    good = (images / BROKEN).read_bytes()
    (images / BROKEN).write_bytes(good[: len(good) // 3])
    (images / NO_IMAGE).write_text("no image at all <script>alert(6)</script>")
    (images / HOSTILE_BROKEN).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    bring_up_to_date()

    draw(images, REMOVED, 2)
    bring_up_to_date()
    compact(FeatureStore.open(world.store), force=True)
    return world


def complete(world: World) -> World:
    """Add samples, three trained runs, and one of them published without its network, in some seconds."""
    from serving.bundle.export import ExportOptions, export_model
    from tests.serving.bundle.conftest import no_network

    _write_samples(world)
    _train(world)
    options = ExportOptions(run=world.runs / "both", use=True)
    export_model(str(world.model), options, network=no_network)  # which no page needs
    return world


def _write_samples(world: World) -> None:
    """Write four days of training and one of test, whose items are the pictures; item 39 has one that nobody knows."""
    names = [*PLAIN, *HOSTILE, COPY, *ADDED, BROKEN]
    uris = [names[item % len(names)] for item in range(39)] + [UNKNOWN]
    write_samples(world.samples / "train", [60] * 4, seed=1)
    write_samples(world.samples / "test", [80], seed=5)
    (world.samples / "test" / "day=2026-01-01.parquet").rename(world.samples / "test" / "day=2026-01-05.parquet")
    for file in world.samples.glob("*/*.parquet"):
        for name in ("behavior_image", "ad_image"):  # an item's number plus 1,000, until then
            change_column(file, name, lambda rows: [[key_of_uri(uris[key - 1_000]) for key in row] for row in rows])


def _train(world: World) -> None:
    """Train two variants that are evaluated, and one of them for twice as many steps with another seed."""
    from tests.trainer.whole_runs import run_alone
    from trainer.comm import SoloComm
    from trainer.evaluation.report import evaluate_run
    from trainer.runs.saved import RunSource

    common = {"data__missing": "zeros", "train__epochs": 2, "train__log_every": 1, "train__eval_every": 4}
    for name, changes in {
        "both": {"train__max_steps": 12},
        "ids-only": {"train__max_steps": 12, "model__images": "none"},
        "both-longer": {"train__max_steps": 24, "train__seed": 7},
    }.items():
        run_alone(Settings(world.folder), run__name=name, **common, **changes)
    with nothing_drawn():  # no page has the plots of a report
        for name in ("both", "ids-only"):
            evaluate_run(RunSource(world.runs / name), SoloComm(), resamples=50)
