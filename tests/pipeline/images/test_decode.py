"""Every odd image is decoded as torchvision would, or refused with its reason."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from torchvision.models import VGG16_Weights

from pipeline.errors import BadImageError
from pipeline.images import decode as decode_module
from pipeline.images.decode import MAX_PIXELS, decode
from pipeline.network import DEFAULT_BACKBONE
from pipeline.network.backbone import preset_of
from pipeline.problems import Problem
from tests.pipeline.conftest import draw_photo, encode_image
from tests.raised import raises

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
SIDE = 20_000
OWN = VGG16_Weights.IMAGENET1K_V1.transforms()


def prepare(data):
    return decode_module.prepare(data, preset_of(DEFAULT_BACKBONE, "imagenet"))


@pytest.fixture(scope="module")
def huge_jpeg(tmp_path_factory):
    path = tmp_path_factory.mktemp("huge") / "huge.jpg"
    Image.new("L", (SIDE, SIDE), 77).save(path, quality=50)
    return path


def colour(data):
    """The colour of an image that has only one, within the precision of JPEG."""
    pixels_HWC = prepare(data).pixels_HWC.astype(int)
    assert np.ptp(pixels_HWC.reshape(-1, 3), axis=0).max() <= 2
    return tuple(pixels_HWC[100, 100])


def assert_close(actual, expected, tolerance=2):
    assert np.abs(np.subtract(actual, expected)).max() <= tolerance


def own_pixels(image):
    """What torchvision's own transform makes of an image, back as (H, W, 3) numbers of 0 to 255."""
    return (OWN(image).numpy().transpose(1, 2, 0) * OWN.std + OWN.mean) * 255


def test_a_photograph_gets_the_pixels_of_torchvisions_own_transform(photos):
    for path in photos.iterdir():
        pixels_HWC = prepare(path.read_bytes()).pixels_HWC
        np.testing.assert_allclose(pixels_HWC, own_pixels(Image.open(path).convert("RGB")), atol=1e-3)


PALETTE = Image.new("RGB", (300, 300), BLUE).convert("P", palette=Image.Palette.ADAPTIVE)
COLOURS = {
    "grey": (Image.new("L", (300, 300), 90), "JPEG", {}, (90, 90, 90), 2),
    "one bit": (Image.new("1", (300, 300), 1), "PNG", {}, WHITE, 0),
    "sixteen bits, scaled and not clipped": (
        Image.fromarray(np.full((260, 260), 0x8000, np.uint16)), "PNG", {}, (128, 128, 128), 0,
    ),
    "cmyk": (Image.new("CMYK", (300, 300), (0, 255, 255, 0)), "JPEG", {"quality": 95}, RED, 6),
    "palette": (PALETTE, "PNG", {}, BLUE, 0),
    "palette of a GIF": (PALETTE, "GIF", {}, BLUE, 0),
    "transparent, on white": (Image.new("RGBA", (300, 300), (*RED, 0)), "PNG", {}, WHITE, 0),
    "half transparent": (Image.new("RGBA", (300, 300), (*RED, 128)), "PNG", {}, (255, 127, 127), 2),
    "transparent grey": (Image.new("LA", (300, 300), (0, 0)), "PNG", {}, WHITE, 0),
    "transparent palette": (PALETTE, "PNG", {"transparency": 0}, WHITE, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", COLOURS)
def test_images_of_any_mode_have_their_colour(name):
    image, kind, options, expected, tolerance = COLOURS[name]
    assert_close(colour(encode_image(image, kind, **options)), expected, tolerance)


def test_exif_orientation_turns_the_image_and_damaged_exif_does_not_lose_it():
    image = Image.new("RGB", (400, 300), RED)
    image.paste(BLUE, (200, 0, 400, 300))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: to be turned clockwise
    prepared = prepare(encode_image(image, exif=exif, quality=95))
    assert (prepared.width, prepared.height) == (300, 400)
    assert_close(prepared.pixels_HWC[10, 112], RED, 6)
    assert_close(prepared.pixels_HWC[-10, 112], BLUE, 6)
    data = encode_image(Image.new("RGB", (300, 300), RED), exif=b"Exif\0\0II*\0" + b"\xff" * 40)
    assert_close(colour(data), RED, 6)


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
def test_a_pixel_has_its_colour_and_a_line_is_not_scaled_to_gigabytes(size):
    line = Image.new("RGB", size, RED)
    if max(size) > 1:  # all but what the centre crop does not see
        line.paste(BLUE, (size[0] // 4, size[1] // 4, *size))
    prepared = prepare(encode_image(line, "PNG"))
    assert (prepared.width, prepared.height) == size
    assert (prepared.pixels_HWC == (BLUE if max(size) > 1 else RED)).all()


def test_long_images_and_large_jpegs_get_nearly_the_pixels_of_a_whole_scaling():
    image = draw_photo(3, 2400, 260)
    difference = np.abs(prepare(encode_image(image, "PNG")).pixels_HWC - own_pixels(image))
    assert difference.mean() < 2.5  # half a pixel apart
    data = encode_image(draw_photo(1, 2600, 2100), quality=92)
    assert decode(data)[0].size == (1300, 1050)
    assert np.abs(prepare(data).pixels_HWC - own_pixels(Image.open(io.BytesIO(data)))).mean() < 1


@pytest.mark.long
def test_a_huge_jpeg_is_decoded_small_and_needs_little_memory(huge_jpeg):
    data = huge_jpeg.read_bytes()
    image, full_size = decode(data)
    assert full_size == (SIDE, SIDE)
    assert image.size == (SIDE // 8, SIDE // 8)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the most that there was
    before = peak_kb()
    assert_close(colour(data), (77, 77, 77))
    assert peak_kb() - before < 150_000  # in full it would take 1,200,000


def peak_kb():
    """Kilobytes of this process's memory at their most, since that was last forgotten."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.long
def test_what_cannot_be_scaled_while_decoding_is_refused_beyond_the_limit(huge_jpeg):
    side = 9_000
    assert side * side > MAX_PIXELS
    progressive = huge_jpeg.read_bytes().replace(b"\xff\xc0", b"\xff\xc2", 1)  # by its header
    for data, problem, values in (
        (encode_image(Image.new("1", (side, side)), "PNG"), Problem.TOO_LARGE, {"width": side, "height": side}),
        (encode_image(Image.new("1", (SIDE, SIDE)), "PNG"), Problem.TOO_MANY_PIXELS, {}),
        (progressive, Problem.TOO_LARGE, {"width": SIDE, "height": SIDE}),
    ):
        with raises(BadImageError, problem, limit=67_108_864, **values):
            prepare(data)


def test_truncated_and_other_files_are_refused():
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encode_image(draw_photo(0), kind)
        with pytest.raises(BadImageError) as refused:
            prepare(data[: len(data) // 2])
        assert refused.value.problem in (Problem.NOT_DECODABLE, Problem.UNKNOWN_FORMAT)
    data, reasons = encode_image(draw_photo(0), "JPEG"), set()
    for cut in range(10, 200, 10):
        with pytest.raises(BadImageError) as refused:
            prepare(data[:-cut])
        reasons.add(str(refused.value))
    assert reasons == {Problem.NOT_DECODABLE.of("image file is truncated")}, "equal reasons are counted together"
    for data, problem, values in (
        (b"", Problem.EMPTY_FILE, {}),
        (b"this is a text\n" * 100, Problem.UNKNOWN_FORMAT, {}),
        (encode_image(draw_photo(0), "EPS"), Problem.UNKNOWN_FORMAT, {}),  # Pillow would start ghostscript
        (encode_image(Image.new("F", (30, 30), 0.5), "TIFF"), Problem.NO_WHITE, {"value": "F"}),
        (b"\xff\xd8\xff\xe0 and then nothing of a JPEG", Problem.NOT_DECODABLE, {}),
    ):
        with raises(BadImageError, problem, **values):
            prepare(data)
