"""Decoding: from the bytes of an image file to the pixels that the network sees.

The steps and sizes are torchvision's own, from the record of the network's weights; for VGG16: short side to 256,
bilinear with antialiasing, centre crop of 224. This module fixes the choices that torchvision leaves open:
- EXIF orientation is applied; the first frame of an animation counts; colour profiles are ignored;
- transparent pixels are put on white; 16-bit grey is scaled to 8 bits; CMYK, palette and grey become RGB;
- a JPEG whose short side is at least 2,048 pixels is decoded at 1/2, 1/4 or 1/8 (libjpeg's scaled decoding), with at
  least 1,024 pixels left (or four times the short side that is asked for, where that is more): three to ten times
  faster, and memory stays small whatever the size of the image;
- other images, and progressive JPEGs, are held in full while they are decoded, so more than MAX_PIXELS are refused;
- of an image more than MAX_ASPECT times longer than wide only the middle is scaled: the crop sees no more of it.
"""

import functools
import io
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin, UnidentifiedImageError

from featurestore.keys import UInt8Array
from pipeline.errors import BadImageError
from pipeline.problems import Problem

if TYPE_CHECKING:
    from torchvision.transforms import InterpolationMode

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_PIXELS = 8192 * 8192  # every baseline JPEG, up to 65,535 x 65,535, is below this at 1/8
MIN_SCALED_SIDE = 1024  # pixels
MAX_ASPECT = 8
JPEG_START = b"\xff\xd8\xff"
PIXELS_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_COUNT = re.compile(r" \(\d+ bytes not processed\)")  # of a file that is cut off: equal reasons are counted together
TURNED_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
PIXELS_WITHOUT_WHITE = ("I", "F")  # 32 bits per pixel: nothing says which number is white


@dataclass(frozen=True)
class Preset:
    """The preprocessing that the weights of a network want; sizes as in torchvision, (short side,) or (H, W)."""

    name: str
    resize: tuple[int, ...]
    crop: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: "InterpolationMode"
    antialias: bool

    @property
    def crop_height_width(self) -> tuple[int, int]:
        """Height and width of the network's input."""
        return self.crop[0], self.crop[-1]

    @property
    def scaled_side(self) -> int:
        """Pixels that the short side keeps when a large JPEG is decoded smaller."""
        return max(MIN_SCALED_SIDE, 4 * max(self.resize))

    def record(self) -> str:
        """Write all that decides which pixels the network sees, as the ExtractorSpec has it: JSON."""
        record = {
            "preset": self.name,
            "resize": self.resize,
            "interpolation": self.interpolation.value,
            "antialias": self.antialias,
            "crop": self.crop,
            "mean": self.mean,
            "std": self.std,
            "exif_orientation": True,
            "alpha": "on white",
            "jpeg_scaled_to_at_least": self.scaled_side,
        }
        return json.dumps(record, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Pixels:
    """An image ready for the network, and the size that it had."""

    pixels_HWC: UInt8Array
    width: int
    height: int


def prepare(data: bytes, preset: Preset) -> Pixels:
    """Decode, resize and crop the image in the file `data`, (H, W, 3) uint8, with the size of the whole image.

    Raises BadImageError with the reason. The decoders run without the GIL, so threads share the work.
    """
    from torchvision.transforms import functional  # loads Torch, which who only decodes, as the explorer, does without

    image, (width, height) = decode(data, preset.scaled_side)
    resized = functional.resize(
        _middle(image), list(preset.resize), interpolation=preset.interpolation, antialias=preset.antialias
    )
    cropped = functional.center_crop(resized, list(preset.crop))
    return Pixels(np.asarray(cropped, dtype=np.uint8), width, height)


def decode(data: bytes, scaled_side: int = MIN_SCALED_SIDE) -> tuple[Image.Image, tuple[int, int]]:
    """Decode the image in the file `data`, RGB and upright, with width and height of the whole image in pixels.

    A large JPEG is smaller than its full size (see above), its short side at least `scaled_side`. Raises BadImageError
    with the reason.
    """
    if not data:
        raise BadImageError(Problem.EMPTY_FILE)
    try:
        image, full_size = _open(data, scaled_side)
        image.load()
        orientation = _orientation(image)
        rgb = _as_rgb(ImageOps.exif_transpose(image) if orientation > 1 else image)
    except BadImageError:
        raise
    except Exception as error:  # on malicious bytes Pillow's decoders raise nearly everything there is
        raise BadImageError(Problem.NOT_DECODABLE, _COUNT.sub("", str(error)) or type(error).__name__) from error
    return rgb, full_size[::-1] if orientation in TURNED_SIDEWAYS else full_size


def _open(data: bytes, scaled_side: int) -> tuple[Image.Image, tuple[int, int]]:
    """Open the image without decoding it; give its full size too. Raises BadImageError."""
    if data.startswith(JPEG_START):
        # Image.open refuses what is large before it can be scaled down, so the plug-in is called by itself.
        jpeg = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
        full_size = jpeg.size
        if not jpeg.info.get("progressive"):
            jpeg.draft(None, (scaled_side, scaled_side))
        _check_pixels(jpeg.size)
        return jpeg, full_size
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError as error:
        raise BadImageError(Problem.UNKNOWN_FORMAT, ", ".join(_formats())) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError(Problem.TOO_MANY_PIXELS, MAX_PIXELS) from error
    _check_pixels(image.size)
    return image, image.size


@functools.cache
def _formats() -> tuple[str, ...]:
    """List the FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_pixels(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise BadImageError(Problem.TOO_LARGE, *size, MAX_PIXELS)


def _orientation(image: Image.Image) -> int:
    """Read the EXIF orientation, 1 (upright) to 8; 1 when the EXIF cannot be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the pixels are loaded and good: a damaged EXIF is not a reason to lose them
        return 1
    return orientation if orientation in range(1, 9) else 1


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in PIXELS_WITHOUT_WHITE:
        raise BadImageError(Problem.NO_WHITE, image.mode)
    if image.mode in PIXELS_16_BIT:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _middle(image: Image.Image) -> Image.Image:
    """Cut out the middle of an image that is very long: else 1 x 20,000 pixels would become 256 x 5,120,000."""
    width, height = image.size
    short, long = sorted(image.size)
    if long <= MAX_ASPECT * short:
        return image
    margin = (long - MAX_ASPECT * short) // 2
    return image.crop((margin, 0, width - margin, height) if width > height else (0, margin, width, height - margin))
