"""Settings of runs whose steps can be compared sample by sample."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.config.config import PRESETS

Places = Any


@pytest.fixture(scope="session")
def settings_of(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Settings in which much depends on the step and on each row's own count; no number of ranks divides a batch."""
    schema = yaml.safe_load((PRESETS / "schema.yaml").read_text())
    schema["fields"].append({"name": "ad_serial", "side": "ad", "kind": "id", "table": "serial"})
    file = tmp_path_factory.mktemp("schema") / "schema.yaml"
    file.write_text(yaml.safe_dump(schema))

    def settings(folder: Path, steps: int, every: int, **changes: Any) -> list[str]:
        return places.settings(
            data__schema_file=file,
            data__global_batch_size=30,
            data__shuffle_streams=3,
            model__compute_dtype="float64",
            model__id_dropout=0.2,
            model__tables__serial=64,
            optim__id_l2=0.01,
            optim__lr_gamma=0.8,
            optim__lr_every=30,
            train__epochs=10_000,
            train__max_steps=steps,
            train__checkpoint_every=every,
            run__dir=folder,
            run__name="run",
            **changes,
        )

    return settings
