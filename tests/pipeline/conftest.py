"""Images drawn for the tests, and a Dask cluster inside this process."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from distributed import LocalCluster


def draw_photo(seed: int, width: int = 300, height: int = 260) -> Image.Image:
    """Soft random shapes in colour, with a little grain: it compresses and scales as a photograph does."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (7, 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
    grain = generator.integers(-6, 7, (height, width, 3), dtype=np.int16)
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def encode_image(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of four drawn JPEGs."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(encode_image(draw_photo(number)))
    return folder


@pytest.fixture(scope="module")
def cluster() -> "Iterator[LocalCluster]":
    """A cluster inside this process."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address=None
    ) as cluster:
        yield cluster
