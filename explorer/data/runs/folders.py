"""Folders of runs: settings, progress and metrics. Half-written files are not an error."""

import contextlib
import time
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from explorer.data.cache import LruCache
from explorer.errors import NotHereError
from explorer.places import Places
from explorer.problems import Problem
from featurestore.errors import StorageError, UserError
from featurestore.parsing import parse_json, parse_yaml
from featurestore.published.paths import RunPath, read_file, run_path
from featurestore.published.versions import VERSIONS
from featurestore.spec import flat
from featurestore.text import one_line
from trainer.evaluation.bootstrap import shown
from trainer.runs.folder import DAYS_FILE, Checkpoint, checkpoints_of, finished, report_of

State = Literal["finished", "running", "unfinished", "unreadable"]

METRICS = ("gauc", "auc", "logloss", "new_ad_auc")
"""Metrics in the list of runs, the main one first."""
ORDER = ("none", "ad", "behavior", "both")
"""Values of model.images, from none to all images."""
TENSORBOARD = "tensorboard"
_QUIET_S = 600.0
"""A run that has written nothing for this long does not count as running."""
_THREADS = 8
_NUMBERS = (
    "global_step",
    "images_per_step",
    "image_references_per_step",
    "num_ranks",
    "samples",
    "samples_per_s",
    "wall_s",
)
"""Numbers of a report that pages show, besides its metrics."""
_MOST = 1e300  # a larger whole number cannot be written with decimals
_MOST_CONFIG_BYTES = 256_000  # a run writes some 10,000
_saved: LruCache["_SavedSettings"] = LruCache(512)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts from the folder of a run."""

    name: str
    state: State
    settings: Mapping[str, Any]
    """Every setting by its name with dots; empty if config.yaml cannot be read."""
    report: Mapping[str, Any]
    """report.json; empty before the run's end."""
    problems: tuple[str, ...] = ()
    """Problems in reading the folder, each a sentence."""
    changed_s: float | None = None
    """Time of the last write, in seconds since 1970; None if unknown."""
    checkpoints: tuple[str, ...] = field(default=())
    """Names of the complete checkpoints, oldest first."""
    checkpoint: str = ""
    """Identity of the newest checkpoint, also across runs of the same name; empty if there is none."""
    samples_digest: str = ""
    """Digest of the training samples in the newest checkpoint; empty if there is none."""

    @property
    def metrics(self) -> Mapping[str, float | int | None]:
        """The metrics of the last evaluation during training, as `shown`; empty before the first."""
        found = self.report.get("metrics")
        values = found.items() if isinstance(found, dict) else ()
        metrics = {name: _number_or_none(value) for name, value in values}
        return {name: shown(metrics, name) for name in metrics}

    @property
    def images(self) -> str:
        """The images that the model sees: none, ad, behavior, both; empty if unknown."""
        return str(self.settings.get("model.images", ""))


def read_runs(places: Places, names: Sequence[str]) -> list[RunFacts]:
    """Read the facts of runs, a few runs at a time, in the order given."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(lambda name: read_facts(places.run(name), name), names))


def run_names(places: Places) -> list[str]:
    """List the runs: folders with a config.yaml and a valid text as name. Last changed first (at an address: by name).

    The days of trainer.daily lie one folder deeper; they are named NAME/DAY.
    """
    assert places.runs is not None
    root = run_path(places.runs)
    with ThreadPoolExecutor(_THREADS) as threads:
        found, others = _with_file({each.name: each for each in root.iterdir()}, "config.yaml", threads)
        series, _ = _with_file(others, DAYS_FILE, threads)
        days = {f"{name}/{day.name}": day for name, folder in series.items() for day in folder.iterdir()}
        found |= _with_file(days, "config.yaml", threads)[0]
    names = sorted(name for name in found if _is_text(name))
    return sorted(names, key=lambda name: -(_changed_s(found[name]) or 0.0))


@dataclass(frozen=True)
class RunSummary:
    """A run with a checkpoint, and the settings by which pages name it."""

    name: str
    images: str
    base: str

    @property
    def text(self) -> str:
        """Describe the run in a few words."""
        return f"{self.base}, IDs alone" if self.images == "none" else f"{self.base}, images={self.images}"


def trained_runs(places: Places) -> list[RunSummary]:
    """List the runs with a checkpoint whose settings can be read, those first that see most images, then by name.

    The days of one trainer.daily stay in the order of their last change.
    """
    found = []
    for name in run_names(places) if places.runs is not None else []:
        folder = places.run(name)
        with contextlib.suppress(UserError, OSError, ValueError):
            settings = _settings(folder / "config.yaml")
            if settings.get("model.images") in ORDER and finished(folder):
                found.append(RunSummary(name, settings["model.images"], str(settings.get("model.base"))))
    return sorted(found, key=lambda run: (-ORDER.index(run.images), run.name.partition("/")[0]))


def _with_file(
    folders: Mapping[str, RunPath], file: str, threads: ThreadPoolExecutor
) -> tuple[dict[str, RunPath], dict[str, RunPath]]:
    """Split folders into those that hold the file and the others."""
    has = dict(zip(folders, threads.map(lambda each: (each / file).is_file(), folders.values()), strict=True))
    with_it = {name: folder for name, folder in folders.items() if has[name]}
    return with_it, {name: folder for name, folder in folders.items() if not has[name]}


def _is_text(name: str) -> bool:
    """Return whether a name is valid UTF-8, so that an address can contain it."""
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def open_run(places: Places, name: str) -> RunPath:
    """Find the folder of a run. Raises NotHereError."""
    try:
        folder = places.run(name)
        is_run = (folder / "config.yaml").is_file()
    except (OSError, ValueError, UserError):
        is_run = False
    if not is_run:
        raise NotHereError(Problem.NO_RUN, name[:60])
    return folder


def read_facts(folder: RunPath, name: str | None = None) -> RunFacts:
    """Read the current facts from a run's folder; unreadable parts become `problems`.

    `name`: of the run, by default that of its folder.
    """
    problems: list[str] = []
    settings = _read(lambda: _settings(folder / "config.yaml"), {}, problems)
    report = _read(lambda: _report(folder), {}, problems)
    changed_s = _changed_s(folder)
    state: State = "unfinished"
    if report:
        state = "finished"
    elif problems:
        state = "unreadable"
    elif changed_s is not None and time.time() - changed_s < _QUIET_S:
        state = "running"
    checkpoints = _read(lambda: finished(folder), [], problems)
    return RunFacts(
        name=name or folder.name,
        state=state,
        settings=settings,
        report=report,
        problems=tuple(problems),
        changed_s=changed_s,
        checkpoints=tuple(each.name for each in checkpoints),
        checkpoint=checkpoints[-1].identity if checkpoints else "",
        samples_digest=_samples_digest(checkpoints[-1]) if checkpoints else "",
    )


def _read(read: Any, otherwise: Any, problems: list[str]) -> Any:
    try:
        return read()
    except (OSError, StorageError, UserError, ValueError) as error:
        problems.append(one_line(error))
        return otherwise


def _report(folder: RunPath) -> Mapping[str, Any]:
    report = report_of(folder) or {}
    if not isinstance(report, dict):
        raise ValueError(Problem.NOT_REPORT.of(folder / "report.json"))
    devices = report.get("devices")
    shown = {name: _number_or_none(report[name]) for name in _NUMBERS if name in report}
    return {**report, **shown, "devices": [*map(str, devices)] if isinstance(devices, list) else []} if report else {}


def _number_or_none(value: object) -> float | int | None:
    """Return a number that a page can show; None for any other value, as the file may contain anything."""
    return value if isinstance(value, int | float) and abs(value) < _MOST else None


def _samples_digest(checkpoint: Checkpoint) -> str:
    """Read which samples a checkpoint was trained on; empty where it does not say."""
    try:
        state = parse_json(checkpoint.read_bytes("state.json"))
        return str(state["origin"]["data"]["samples_digest"])
    except (OSError, StorageError, UserError, ValueError, KeyError, TypeError):
        return ""


class _SavedSettings(NamedTuple):
    """The settings of a file, or the error, which is cached as well."""

    settings: Mapping[str, Any]
    problem: str


def _settings(file: RunPath) -> Mapping[str, Any]:
    """Read the settings of a saved configuration, again if the file has changed. Raises ValueError."""
    if isinstance(file, Path):
        found = file.stat()
        name: Hashable = (str(file), found.st_ino, found.st_size, found.st_mtime_ns)
        saved = _saved.get(name, lambda: _parsed(file, found.st_size))
    else:
        content = read_file(file)
        saved = _saved.get(content, lambda: _parsed(file, len(content)))
    if saved.problem:
        raise ValueError(saved.problem)
    return saved.settings


def _parsed(file: RunPath, size_bytes: int) -> _SavedSettings:
    """Read a saved configuration like the trainer, without its checks; about 10 ms."""
    try:
        if size_bytes > _MOST_CONFIG_BYTES:
            raise ValueError(Problem.LARGE_CONFIG.of(size_bytes, _MOST_CONFIG_BYTES))
        loaded = parse_yaml(read_file(file).decode(), aliases=False)
        if not isinstance(loaded, dict):
            raise ValueError(Problem.NOT_CONFIG.of())
        return _SavedSettings({**_defaults(), **dict(flat(loaded))}, "")
    except (UserError, ValueError) as error:
        return _SavedSettings({}, one_line(error))


@cache
def _defaults() -> Mapping[str, Any]:
    from trainer.config import Config

    return dict(flat(Config().model_dump(mode="json")))


def _changed_s(folder: RunPath) -> float | None:
    """Return the time of the last write to the run's files; None at an address, where it is unknown."""
    if not isinstance(folder, Path):
        return None
    looked_at = [folder / "config.yaml", folder / "report.json", checkpoints_of(folder) / VERSIONS]
    with contextlib.suppress(OSError):
        looked_at += (folder / TENSORBOARD).iterdir()
    times = []
    for file in looked_at:
        try:
            times.append(file.stat().st_mtime)
        except OSError:
            continue
    return max(times, default=None)
