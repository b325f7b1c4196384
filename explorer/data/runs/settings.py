"""Settings of several runs: those that differ, and groups of runs whose images alone differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from explorer.data.runs.folders import RunFacts
from trainer.config.comparison import OF_IMAGES, settings_that_decide

IMAGES = "model.images"
SAMPLES = "data.samples"
_STORES = ("data.store", "data.stores", "data.store_version", "data.store_versions")
"""Settings that say where images are looked up; a finished run that reads a store has recorded which it was."""
ORDER = ("none", "ad", "behavior", "both")
"""Values of model.images, from the least to the most."""
WITHOUT_IMAGES_IDLE = {"data.missing", *map("model.{}".format, OF_IMAGES)}
"""Settings that a run without images has no use for."""
_MISSING = object()


def shown_first(name: str, images: str) -> tuple[int, str]:
    """Give what sorts runs so that the one that pages show first leads: those that see most images, then by name.

    The days of one trainer.daily are alike: they stay in the order that they had.
    """
    return -ORDER.index(images) if images in ORDER else 1, name.partition("/")[0]


@dataclass(frozen=True)
class SettingRow:
    """A setting and its value in each run, as text; `is_figure`: whether it may change what is learned."""

    name: str
    values: tuple[str, ...]
    is_figure: bool


def no_figure() -> frozenset[str]:
    """Name the settings that change no figure, with dots; the seed does, by chance."""
    names = {f"{section}.{name}" for section, several in settings_that_decide("nothing").items() for name in several}
    return frozenset(names - {SAMPLES, *_STORES})


def differing(runs: Sequence[RunFacts]) -> list[SettingRow]:
    """List the settings in which the runs differ: those that change figures first, the images at the top.

    Where samples and stores are changes none if the runs recorded what they read there: `snapshots` tells that.
    """
    ignored = no_figure()
    if all(run.samples_digest for run in runs):
        ignored |= {SAMPLES}
    if all(run.images == "none" or _recorded(run) for run in runs):
        ignored |= set(_STORES)
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = []
    for name in names:
        values = [run.settings.get(name, _MISSING) for run in runs]
        if any(value != values[0] for value in values):
            counted = [run for run in runs if run.images != "none"] if name in WITHOUT_IMAGES_IDLE else runs
            is_same = len({text_of(run.settings.get(name, _MISSING)) for run in counted}) < 2
            is_figure = not is_same and not ignored & {name, _named(name)}
            rows.append(SettingRow(name, tuple(map(text_of, values)), is_figure))
    return sorted(rows, key=lambda row: (not row.is_figure, row.name != IMAGES))


def snapshots(runs: Sequence[RunFacts]) -> list[SettingRow]:
    """List what the runs recorded of their samples and stores that differs, of the stores those that read them."""
    of_run = [run.report.get("stores") for run in runs]
    stores = [found if isinstance(found, dict) else {} for found in of_run]
    rows = []
    digests = [run.samples_digest for run in runs]
    if len(set(digests) - {""}) > 1:
        shortened = tuple(digest.rpartition(":")[2][:8] or "–" for digest in digests)
        rows.append(SettingRow("digest of the samples", shortened, True))
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
    of one size are in the order of `runs`. Samples and snapshots count by what the runs recorded of them, else by
    their addresses; a run without images reads no store and has no use for `WITHOUT_IMAGES_IDLE`, so it goes with runs
    of any.
    """
    alike: dict[str, list[RunFacts]] = {}
    for run in runs:
        if run.state == "finished" and run.images in ORDER:
            alike.setdefault(_rest(run), []).append(run)
    groups: dict[tuple[str, str], dict[str, RunFacts]] = {}
    for rest, several in alike.items():
        for seen in dict.fromkeys(_seen(run) for run in several if run.images != "none"):
            for run in several:
                if run.images == "none" or _seen(run) == seen:
                    groups.setdefault((rest, seen), {}).setdefault(run.images, run)
    found = [[group[images] for images in ORDER if images in group] for group in groups.values()]
    return sorted((group for group in found if len(group) > 1), key=lambda group: -len(group))


def _rest(run: RunFacts) -> str:
    """Write all that changes figures of any run but the images, and where they are looked up."""
    ignored = no_figure() | {IMAGES, SAMPLES, *_STORES} | WITHOUT_IMAGES_IDLE
    kept = sorted((name, text_of(value)) for name, value in run.settings.items() if not ignored & {name, _named(name)})
    return repr((run.samples_digest or text_of(run.settings.get(SAMPLES, _MISSING)), kept))


def _seen(run: RunFacts) -> str:
    """Write how a run sees images, and where it looked them up: by commits that it recorded, else by settings."""
    idle = [(name, text_of(value)) for name, value in run.settings.items() if name in WITHOUT_IMAGES_IDLE]
    places = [(name, text_of(value)) for name, value in run.settings.items() if _named(name) in _STORES]
    return repr((sorted(idle), _recorded(run) or sorted(places)))


def _recorded(run: RunFacts) -> list[tuple[str, str]]:
    """List the stores that a run read, each with its commit; empty where it recorded none."""
    stores = run.report.get("stores")
    if not isinstance(stores, dict) or not all(isinstance(each, dict) for each in stores.values()):
        return []
    return sorted((name, str(each.get("commit_id"))) for name, each in stores.items())


def _named(setting: str) -> str:
    """Name the setting that a value is of: data.stores for data.stores.audio."""
    return ".".join(setting.split(".")[:2])
