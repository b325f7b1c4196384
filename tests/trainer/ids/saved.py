"""What the newest checkpoint of a run holds."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from trainer.runs.folder import find_checkpoint


def tensors_of(run: Path) -> dict[str, Tensor]:
    """All tensors of all of its files, by name."""
    path = find_checkpoint(run)
    return {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}
