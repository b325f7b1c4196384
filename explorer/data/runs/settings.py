"""Settings of several runs: those that differ, and groups of runs whose images alone differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from explorer.data.runs.folders import RunFacts

IMAGES = "model.images"
ORDER = ("none", "ad", "behavior", "both")
"""Values of model.images, from the least to the most."""
_MISSING = object()


def shown_first(name: str, images: str) -> tuple[int, str]:
    """Give what sorts runs so that the one that pages show first leads: those that see most images, then by name."""
    return -ORDER.index(images) if images in ORDER else 1, name


@dataclass(frozen=True)
class SettingRow:
    """A setting and its value in each run, as text; `is_figure`: whether it may change what is learned."""

    name: str
    values: tuple[str, ...]
    is_figure: bool


def no_figure() -> frozenset[str]:
    """Name the settings that change no figure, with dots; the seed does, by chance."""
    from trainer.config.config import CHANGES_NO_FIGURE

    names = {f"{section}.{name}" for section, several in CHANGES_NO_FIGURE.items() for name in several}
    return frozenset(names - {"train.seed", "run.warm_start"})


def differing(runs: Sequence[RunFacts]) -> list[SettingRow]:
    """List the settings in which the runs differ: those that change figures first, the images at the top."""
    ignored = no_figure()
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = []
    for name in names:
        values = [run.settings.get(name, _MISSING) for run in runs]
        if any(value != values[0] for value in values):
            rows.append(SettingRow(name, tuple(map(text_of, values)), name not in ignored))
    return sorted(rows, key=lambda row: (not row.is_figure, row.name != IMAGES))


def snapshots(runs: Sequence[RunFacts]) -> list[SettingRow]:
    """List the stores of which the runs were trained on different snapshots, those that read them."""
    of_run = [run.report.get("stores") for run in runs]
    stores = [found if isinstance(found, dict) else {} for found in of_run]
    rows = []
    for name in dict.fromkeys(name for found in stores for name in found):
        records = [found.get(name) for found in stores]
        values = [_snapshot(record) if isinstance(record, dict) else "–" for record in records]
        if len({value for value in values if value != "–"}) > 1:
            rows.append(SettingRow(f"snapshot of store {name}", tuple(values), True))
    return rows


def _snapshot(record: Mapping[str, Any]) -> str:
    return f"{record.get('version')} (commit {str(record.get('commit_id'))[:8]})"


def text_of(value: Any) -> str:
    """Write the value of a setting as its file has it."""
    if value is _MISSING:
        return "–"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(text_of, value))}]"
    return str(value)


def image_groups(runs: Sequence[RunFacts]) -> list[list[RunFacts]]:
    """Find groups of finished runs whose images differ while all else that changes figures is the same.

    Of several runs with the same images the first counts. Each group is in ORDER, the one with most runs first; groups
    of one size are in the order of `runs`.
    """
    groups: dict[str, dict[str, RunFacts]] = {}
    for run in runs:
        if run.state == "finished" and run.images in ORDER:
            groups.setdefault(_rest(run.settings), {}).setdefault(run.images, run)
    found = [[group[images] for images in ORDER if images in group] for group in groups.values()]
    return sorted((group for group in found if len(group) > 1), key=lambda group: -len(group))


def _rest(settings: Mapping[str, Any]) -> str:
    ignored = no_figure() | {IMAGES}
    return repr(sorted((name, text_of(value)) for name, value in settings.items() if name not in ignored))
