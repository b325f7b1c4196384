"""Short runs on one store of some places, and what they have learnt."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from trainer.comm import SoloComm
from trainer.config.config import load_config
from trainer.main import train
from trainer.runs.folder import find_checkpoint

Places = Any


def train_on(places: Places, name: str, store: str, **changes: Any) -> Path:
    """Train 24 steps on the store of that name, in float32, as numbers are compared; return the run's folder."""
    short = {"train__epochs": 3, "data__global_batch_size": 16, "train__max_steps": 24}
    changes = {**short, "model__compute_dtype": "float32", **changes}
    config = load_config(settings=places.settings(run__name=name, data__store=places.folder / store, **changes))
    train(config, SoloComm())
    return Path(config.run.dir) / name


def dense(folder: Path) -> dict[str, torch.Tensor]:
    """Read the dense parameters of a run's newest checkpoint."""
    return load(find_checkpoint(folder).read_bytes("dense.safetensors"))
