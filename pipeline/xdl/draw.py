"""Random data as XDL's CrossMedia example draws it: text samples and binary images, in its sizes by default.

Facts of the example (alibaba/x-deeplearning, CrossMedia, randtxt.py and randimg.py): 1,024 lines, each a group of its
own; user0 to user3 with 1 to 4 weighted ids from 1 to 1,024, user_img with 1 to 31; ad0 to ad3 with one number, ad_img
with one id; a label between 0 and 1. 4,096 images with keys from 1, each 4,096 normal numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from featurestore.console.files import write_json
from pipeline.options import XDL_DIM
from pipeline.samples.publish import MARK, FolderContent, replaced_folder
from pipeline.xdl.line import Tokens, XdlLine, format_line

TEXT_FILE, IMAGE_FOLDER = "data.txt", "imgs"
CONTENT = FolderContent("random data", (MARK, TEXT_FILE))
_BLOCK_NUMBERS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """Sizes; the defaults are the example's."""

    num_lines: int = 1024
    num_images: int = 4096
    dim: int = XDL_DIM
    num_ids: int = 1024  # ids are 1 to this, those of images too
    max_behaviors: int = 31
    seed: int = 0
    timestamp: int = 1_543_622_400


def draw(options: DrawOptions, target: Path, advance: Callable[[int], None] = lambda rows: None) -> None:
    """Draw data.txt and imgs/data.0 to data.1023 below `target`, which appears as a whole.

    Equal options give equal bytes. Raises SampleError where the folder holds anything else, or cannot be written.
    """
    from pipeline.vectors.formats import NUM_FILES  # loads pyarrow: not for the help of the job
    from pipeline.xdl.line import append_records

    with replaced_folder(target, CONTENT) as folder:
        with (folder / TEXT_FILE).open("w", encoding="utf-8") as file:
            file.writelines(f"{format_line(line)}\n" for line in draw_lines(options))
        images = folder / IMAGE_FOLDER
        images.mkdir()
        for number in range(NUM_FILES):
            (images / f"data.{number}").touch()
        random = np.random.default_rng([options.seed, 1])
        rows = max(1, _BLOCK_NUMBERS // options.dim)
        for start in range(1, options.num_images + 1, rows):
            keys_K = np.arange(start, min(start + rows, options.num_images + 1), dtype=np.int64)
            append_records(images, keys_K, random.normal(size=(len(keys_K), options.dim)).astype(np.float32))
            advance(len(keys_K))
        write_json(folder / MARK, asdict(options))


def draw_lines(options: DrawOptions) -> Iterator[XdlLine]:
    """Draw the text samples."""
    random = np.random.default_rng([options.seed, 0])

    def sparse(most: int) -> Tokens:
        ids = random.integers(1, options.num_ids + 1, random.integers(1, most + 1))
        return [f"{number}:{random.random():f}" for number in ids]

    for number in range(options.num_lines):
        user = {f"user{field}": sparse(4) for field in range(4)} | {"user_img": sparse(options.max_behaviors)}
        ad = {f"ad{field}": [f"{random.random():f}"] for field in range(4)} | {"ad_img": sparse(1)}
        label = [f"{random.random():f}"]
        yield XdlLine(f"skey{number}", f"gkey{number}", user, ad, label, str(options.timestamp))
