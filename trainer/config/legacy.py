"""Files of earlier versions: settings that have moved since, and what was so before there was a setting for it."""

from collections.abc import Iterator, Mapping
from typing import Any

from featurestore.published.paths import RunPath
from trainer.config.options import ModelConfig
from trainer.files import checkpoints_of

MOVED = {f"train.{name}": f"optim.{name}" for name in ("lr", "lr_gamma", "lr_every", "id_l2")}
"""From the name of a setting in earlier versions to its name now."""

BEFORE: dict[str, dict[str, Any]] = {
    "data": {"shuffle_streams": 1},
    "model": {
        "multi_hot": "sum",
        "activation": "prelu",
        "init": "torch",
        "id_init_std": 0.05,
        "image_products": False,
        "feature_dropout": 0.0,
        "image_holdout": 0.0,
    },
    "optim": {"ids": "rowwise_adam", "ids_lr": None, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
}
"""What was so before there was the setting, by section, where the preset may say something else now: a saved run that
lacks one continues as it was."""


def model_before() -> dict[str, Any]:
    """List the settings of the model that an old checkpoint does not know, as they were then."""
    return ModelConfig(tables={}).model_dump() | BEFORE["model"]


OF_EXACT_TABLES = {"when_full": "refuse"}
"""The same of the settings of an exact ID table."""


def moved(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """List the old and the new name of each setting in `values`, by section, that has moved."""
    for old, new in MOVED.items():
        section, _, name = old.partition(".")
        if isinstance(values.get(section), Mapping) and name in values[section]:
            yield old, new


def up_to_date(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Give each setting of a saved configuration the name that it has now, and `BEFORE` what it lacks."""
    values = {name: dict(section) if isinstance(section, Mapping) else section for name, section in saved.items()}
    for old, new in moved(saved):
        (section, _, name), (new_section, _, new_name) = old.partition("."), new.partition(".")
        values.setdefault(new_section, {})[new_name] = values[section].pop(name)
    for section, known in BEFORE.items():
        if isinstance(found := values.get(section, {}), dict):
            values[section] = known | found
    if isinstance(model := values.get("model"), dict):
        values["model"] = with_tables_up_to_date(model)
    return values


def with_tables_up_to_date(model: Mapping[str, Any]) -> dict[str, Any]:
    """Add `OF_EXACT_TABLES` to the exact tables of a saved section model where they lack it."""
    if not isinstance(tables := model.get("tables"), Mapping):
        return dict(model)
    filled = {name: OF_EXACT_TABLES | table if _is_exact(table) else table for name, table in tables.items()}
    return {**model, "tables": filled}


def _is_exact(table: Any) -> bool:
    return isinstance(table, Mapping) and table.get("kind") == "exact"


def is_saved(file: RunPath) -> bool:
    """Tell whether a file is the configuration that a run has written into its folder."""
    return file.name == "config.yaml" and checkpoints_of(file.parent).is_dir()
