"""Whether a GPU trains as the CPU does:  python tests/trainer/equivalence/on_device.py --device cuda

Every variant is trained on the CPU and twice on the device. The losses have to be the CPU's up to rounding, and the
same bits both times; so have the weights and rows at the end. `--device cpu` runs the same where there is no GPU.
"""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from worker import run
from worlds import make_store

from featurestore import FeatureStore
from tests.variants import TOLERANCE, VARIANTS
from trainer.comm import SoloComm


def differences(store: FeatureStore, name: str, dtype: str, device: str) -> list[str]:
    """Train one variant in all three ways; return what differs, a line each."""
    on_cpu, first, second = (run(SoloComm(), store, VARIANTS[name], dtype, each) for each in ("cpu", device, device))
    found = []
    wanted, losses = (torch.tensor(each["losses_P"][0], dtype=torch.float64) for each in (on_cpu, first))
    if not torch.allclose(losses, wanted, rtol=TOLERANCE[dtype], atol=0):
        worst = float(((losses - wanted) / wanted).abs().max())
        found.append(f"a loss differs from the CPU's by {worst:.1e} of it, more than {TOLERANCE[dtype]:g}")
    if first["losses_P"] != second["losses_P"]:
        found.append("the losses of two runs differ")
    strange = [key for key, value in first["trained"].items() if not torch.equal(value, second["trained"][key])]
    return [*found, *(f"{key} of two runs differs" for key in strange)]


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    only: Annotated[list[str] | None, typer.Option(help="A variant; may be repeated. Default: all.")] = None,
) -> None:
    """Compare training on a device with training on the CPU."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no GPU found: PyTorch sees none on this machine; --device cpu compares the CPU with itself")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="on-device-") as folder:
        make_store(Path(folder) / "store")
        store = FeatureStore.open(Path(folder) / "store")
        for name in only or VARIANTS:
            for dtype in VARIANTS[name].dtypes:
                found = differences(store, name, dtype, device)
                failed += bool(found)
                print(f"{name}/{dtype}: {'; '.join(found[:3]) or 'same'}", flush=True)
    if failed:
        sys.exit(f"error: {failed} variants train otherwise on {device}")
    print(f"all trained on {device} as on the CPU")


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
