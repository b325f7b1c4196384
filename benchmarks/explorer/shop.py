"""A large drawn store with days of changes, and the pictures of some of its images."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import Progress

DAYS = 10
CHANGED_SHARE, GONE_SHARE, EQUAL_SHARE = 0.01, 0.001, 0.005
NUM_SHARDS = 64
NUM_BROKEN = 100
PICTURE_SIDE = 512


@dataclass(frozen=True)
class Shop:
    """A store, and below `images` the first of its pictures."""

    store: Path
    images: Path
    pictures: list[str]
    """Names of those on the disk."""

    @property
    def options(self) -> list[str]:
        """The options of the explorer."""
        return ["-m", "explorer", "--store", str(self.store), "--images", str(self.images)]


def make(folder: Path, images: int, dim: int, pictures: int, progress: Progress) -> Shop:
    """Make the store and the pictures, or take those of an earlier run of the same sizes."""
    place = folder / f"{images}x{dim}-{pictures}"
    shop = Shop(place / "features", place / "images", [name_of(number) for number in range(pictures)])
    done = place / "made"
    if not done.exists():
        place.mkdir(parents=True, exist_ok=True)
        _draw(shop, progress)
        _fill(shop.store, images, dim, progress)
        done.touch()
    return shop


def name_of(number: int) -> str:
    """Name a picture."""
    return f"shop/{number // 1000:04}/{number:07}.jpg"


def _draw(shop: Shop, progress: Progress) -> None:
    """Draw soft shapes with grain, which compress and scale as photographs do."""
    from PIL import Image

    for number, name in enumerate(progress.track(shop.pictures, description="draw pictures")):
        draw = np.random.default_rng(number)
        coarse = Image.fromarray(draw.integers(0, 256, (7, 8, 3), dtype=np.uint8))
        soft = np.asarray(coarse.resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC), np.int16)
        grain = draw.integers(-6, 7, (PICTURE_SIDE, PICTURE_SIDE, 3), dtype=np.int16)
        file = shop.images / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(soft + grain, 0, 255).astype(np.uint8)).save(file, quality=90)


def _fill(place: Path, images: int, dim: int, progress: Progress) -> None:
    """Write all images at once, then some days on which images change, go and break."""
    from featurestore import ExtractorSpec, FeatureRows, FeatureStore, StoreInfo
    from featurestore.keys import keys_of_uris
    from featurestore.staging import QuarantineRow

    spec = ExtractorSpec(
        backbone="drawn", layer="none", weights_digest="none", preprocessing="none", compute_dtype="bfloat16"
    )
    store = FeatureStore.create(str(place), StoreInfo(num_shards=NUM_SHARDS, dim=dim, extractor=spec))
    draw = np.random.default_rng(0)

    def put(numbers_N: np.ndarray, operation: str) -> None:
        seeds_N = np.where(draw.random(len(numbers_N)) < EQUAL_SHARE, 1, draw.integers(2, 1 << 62, len(numbers_N)))
        rows = FeatureRows.of(
            [name_of(number) for number in numbers_N.tolist()],
            np.maximum(draw.standard_normal((len(numbers_N), dim), dtype=np.float32), 0),
            content_digests=[int(seed).to_bytes(16, "little") for seed in seeds_N],
            widths=np.full(len(numbers_N), PICTURE_SIDE),
            heights=np.full(len(numbers_N), PICTURE_SIDE),
        )
        store.put(rows, operation)

    task = progress.add_task("write the store", total=1 + DAYS)
    put(np.arange(images), "extract")
    progress.advance(task)
    for _ in range(DAYS):
        put(draw.choice(images, max(1, int(CHANGED_SHARE * images)), replace=False), "refresh")
        gone = [name_of(number) for number in draw.integers(0, images, max(1, int(GONE_SHARE * images))).tolist()]
        store.delete(keys_of_uris(gone), "refresh")
        progress.advance(task)
    broken = [f"broken/{number}.jpg" for number in range(NUM_BROKEN)]
    keys = keys_of_uris(broken).tolist()
    store.add_quarantine(
        QuarantineRow(key, uri, "cannot be decoded", 0.0) for key, uri in zip(keys, broken, strict=True)
    )
