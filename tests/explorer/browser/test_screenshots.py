"""The pictures for README and docs are of whole pages, 1,200 pixels wide, and small."""

import io

import numpy as np
from PIL import Image

from tools.browser.screenshots import MOST_BYTES, SHOTS, WIDTH, small, taken


def test_pictures_of_the_pages(chromium, explorer):
    """Those whose parts come at once; the shop's runs have the demo's names."""
    shots = [shot for shot in SHOTS if shot.name in ("store", "run")]
    pictures = dict(taken(chromium, explorer.url, shots, "data/demo"))
    assert set(pictures) == {"store", "run"}
    for data in pictures.values():
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.width, image.mode) == ("PNG", WIDTH, "P")
        assert len(data) <= MOST_BYTES
        assert np.asarray(image.convert("RGB")).std() > 10


def test_a_picture_of_noise_gets_fewer_colours():
    noise = np.random.default_rng(0).integers(0, 256, (900, WIDTH, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    fewest = Image.open(io.BytesIO(small(buffer.getvalue())))
    assert len(fewest.getcolors()) <= 16
