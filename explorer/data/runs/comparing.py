"""Settings, evaluations and predictions of several runs, compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from explorer.data.background import Task
from explorer.data.cache import LruCache, digest_of
from explorer.data.runs.folders import ORDER, RunFacts
from explorer.errors import ExplorerError
from explorer.places import Places
from explorer.problems import Problem
from featurestore.errors import StorageError, UserError
from featurestore.parsing import first_mistake, parse_json
from featurestore.published.paths import RunPath, read_file
from featurestore.text import one_line
from trainer.config import settings_that_decide
from trainer.evaluation.bootstrap import Difference, Evaluation

if TYPE_CHECKING:
    from trainer.evaluation.predict import Predictions
    from trainer.runs.saved import SavedRun


IMAGES = "model.images"
SAMPLES = "data.samples"
_STORES = ("data.store", "data.stores", "data.store_version", "data.store_versions")
"""Settings for the lookup of images; a finished run that reads a store has recorded its snapshot."""
COMPUTE_DTYPE = "model.compute_dtype"
_OF_IMAGES = (
    "pooling", "pooling_length", "image_products", "visual_width", "embed_hidden", "id_proxy", "image_dropout"
)  # fmt: skip
WITHOUT_IMAGES_IDLE = {"data.missing", COMPUTE_DTYPE, *map("model.{}".format, _OF_IMAGES)}
"""Settings that a run without images does not use, unless all of it computes in float64."""
_MISSING = object()


@dataclass(frozen=True)
class SettingRow:
    """A setting and its value in each run, as text; `is_figure`: whether it may change results."""

    name: str
    values: tuple[str, ...]
    is_figure: bool


def no_figure() -> frozenset[str]:
    """List the settings that do not change results, with dots; the seed does, by chance."""
    names = {f"{section}.{name}" for section, several in settings_that_decide("nothing").items() for name in several}
    return frozenset(names - {SAMPLES, *_STORES})


def differing(runs: Sequence[RunFacts]) -> list[SettingRow]:
    """List the settings in which the runs differ: those that change results first, images at the top.

    Addresses of samples and stores do not count if the runs recorded their content, see `snapshots`.
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
            counted = [run for run in runs if name not in WITHOUT_IMAGES_IDLE or _uses(run, name)]
            is_same = len({text_of(run.settings.get(name, _MISSING)) for run in counted}) < 2
            is_figure = not is_same and not ignored & {name, _named(name)}
            rows.append(SettingRow(name, tuple(map(text_of, values)), is_figure))
    return sorted(rows, key=lambda row: (not row.is_figure, row.name != IMAGES))


def _uses(run: RunFacts, name: str) -> bool:
    """Return whether a setting of WITHOUT_IMAGES_IDLE decides something in this run."""
    return run.images != "none" or (name == COMPUTE_DTYPE and run.settings.get(name) == "float64")


def snapshots(runs: Sequence[RunFacts]) -> list[SettingRow]:
    """List the recorded samples and stores in which the runs differ; for stores only runs that read them."""
    of_run = [run.report.get("stores") for run in runs]
    stores = [found if isinstance(found, dict) else {} for found in of_run]
    rows = []
    digests = [run.samples_digest for run in runs]
    if len(set(digests) - {""}) > 1:
        shortened = tuple(digest.rpartition(":")[2][:8] or "–" for digest in digests)
        rows.append(SettingRow("digest of the samples", shortened, True))
    for name in dict.fromkeys(name for found in stores for name in found):
        records = [found.get(name) for found in stores]
        values = [
            f"{each.get('version')} (commit {str(each.get('commit_id'))[:8]})" if isinstance(each, dict) else "–"
            for each in records
        ]
        if len({value for value in values if value != "–"}) > 1:
            rows.append(SettingRow(f"snapshot of store {name}", tuple(values), True))
    return rows


def text_of(value: Any) -> str:
    """Format the value of a setting as in its file."""
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
    """Find groups of finished runs that differ in their images and agree in all else that changes results.

    Of several runs with the same images the first counts. Each group is in ORDER, the largest group first; groups of
    one size are in the order of `runs`. Samples and snapshots are compared by what the runs recorded, or else by their
    addresses. A run without images reads no store and does not use `WITHOUT_IMAGES_IDLE`, so it fits any of these.
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
    """Return a text of all settings that change results, except the images and their lookup."""
    ignored = no_figure() | {IMAGES, SAMPLES, *_STORES} | WITHOUT_IMAGES_IDLE
    kept = sorted((name, text_of(value)) for name, value in run.settings.items() if not ignored & {name, _named(name)})
    kept.append(("in float64", str(run.settings.get(COMPUTE_DTYPE) == "float64")))
    return repr((run.samples_digest or text_of(run.settings.get(SAMPLES, _MISSING)), kept))


def _seen(run: RunFacts) -> str:
    """Return a text of a run's use of images and their lookup: by recorded commits, or else by settings."""
    idle = [(name, text_of(value)) for name, value in run.settings.items() if name in WITHOUT_IMAGES_IDLE]
    places = [(name, text_of(value)) for name, value in run.settings.items() if _named(name) in _STORES]
    return repr((sorted(idle), _recorded(run) or sorted(places)))


def _recorded(run: RunFacts) -> list[tuple[str, str]]:
    """List the stores that a run read, each with its commit; empty if it recorded none."""
    stores = run.report.get("stores")
    if not isinstance(stores, dict) or not all(isinstance(each, dict) for each in stores.values()):
        return []
    return sorted((name, str(each.get("commit_id"))) for name, each in stores.items())


def _named(setting: str) -> str:
    """Return the setting that a value belongs to: data.stores for data.stores.audio."""
    return ".".join(setting.split(".")[:2])


@dataclass(frozen=True)
class Bootstrap:
    """The bootstrap of the intervals."""

    resamples: int
    level: float


@dataclass(frozen=True, kw_only=True)
class EvaluationReport(Evaluation):
    """The results of an evaluation, with the run and samples that were evaluated."""

    checkpoint: str
    samples: str
    bootstrap: Bootstrap


_EVALUATION = TypeAdapter(EvaluationReport)


def read_evaluation(run: RunPath) -> EvaluationReport | None:
    """Read the evaluation of a run, or return None. Raises ExplorerError if it cannot be read."""
    file = run / "evaluation" / "report.json"
    try:
        return _EVALUATION.validate_python(parse_json(read_file(file)))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ExplorerError(Problem.NOT_EVALUATION, file, first_mistake(error)) from error
    except (OSError, StorageError, ValueError) as error:
        raise ExplorerError(Problem.UNREADABLE, file, error) from error


MOST_IMPRESSIONS = 300_000
MOST_IMAGES = 200_000
"""Beyond these limits use a command: a page computes for about a minute."""
_cached: "LruCache[Predictions]" = LruCache(16)
_LOCK = Lock()
"""One prediction at a time: each uses all cores, and two of one run would be the same."""


class TooMuchError(ExplorerError):
    """The page would have to compute too many predictions."""


def predictions_of(places: Places, name: str, task: Task[Any]) -> "Predictions":
    """Predict by the newest checkpoint of a run, or return cached predictions.

    Uses the samples of --samples, else the run's own; the run's own store at the snapshot of the training, else the
    newest snapshot of --store. Cost: about 10 s for 20,000 impressions. Raises TooMuchError beyond the limits above,
    TrainerError, FeatureStoreError.
    """
    from trainer.evaluation.predict import predict_run
    from trainer.runs.saved import read_run

    folder = places.run(name)
    task.tell(f"opens {name}")
    saved = read_run(folder, None, places.samples)
    store = None if saved.config.model.images == "none" else places.store_for(saved.config.data.store)

    def predict() -> "Predictions":
        with _LOCK:
            task.tell(f"predicts with {name}")
            return predict_run(folder, samples=places.samples, store=store)

    return _cached.get(_digest(saved, places, store), predict)


def _digest(saved: "SavedRun", places: Places, store: str | None) -> str:
    """Return an identity of the predictions' inputs; raise TooMuchError if there are too many."""
    from featurestore.store import FeatureStore
    from trainer.comm import SoloComm
    from trainer.runs.saved import open_test

    index = open_test(SoloComm(), saved.config, saved.schema, places.samples)
    if index.num_samples > MOST_IMPRESSIONS:
        raise TooMuchError(Problem.TOO_MANY_IMPRESSIONS, index.num_samples, MOST_IMPRESSIONS)
    commits: list[Any] = []
    for place in saved.places:
        url = store if store is not None and place.setting == "data.store" else place.url
        version = None if url == store else saved.state.version_of(place.name)
        snapshot = FeatureStore.open(url).snapshot(version)
        if snapshot.num_rows > MOST_IMAGES:
            raise TooMuchError(Problem.TOO_MANY_IMAGES, url, snapshot.num_rows, MOST_IMAGES)
        commits.append([snapshot.info.store_id, snapshot.manifest.commit_id, snapshot.version])
    root = Path(index.storage.url)
    files = sorted({each.file for each in index.row_groups}) if root.is_dir() else []
    times = [(root / file).stat().st_mtime_ns for file in files]
    return digest_of([saved.digest, index.storage.url, index.layout_digest, times, commits])


COMPARED = ("gauc", "auc", "logloss")
NEW_ADS = "new_ad_auc"
"""AUC of the impressions of ads that neither run was trained on."""
TITLES = {
    "gauc": "GAUC",
    "auc": "AUC",
    "logloss": "log loss",
    "new_ad_auc": "AUC, new ads",
    "calibration": "predicted / clicked",
}
LOWER_IS_BETTER = frozenset({"logloss"})
RESAMPLES = 1000
_MOST_RESAMPLED = 300_000_000
"""Impressions times resamples that one comparison may cost: some seconds."""


@dataclass(frozen=True, kw_only=True)
class RunDifference(Difference):
    """Difference of a metric between a run and the reference run; None if it is not defined."""

    run: str
    against: str

    @property
    def is_clear(self) -> bool:
        """Return whether the interval excludes 0, so that the difference is significant."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def is_better(self) -> bool | None:
        """Return whether the run is better than the other one; None if the difference is not significant."""
        if not self.is_clear or self.value is None:
            return None
        return (self.value < 0) == (self.metric in LOWER_IS_BETTER)

    @property
    def verdict(self) -> str:
        """Summarise the difference in one sentence."""
        title, run, against = TITLES[self.metric], quoted(self.run), quoted(self.against)
        if self.value is None:
            return f"{title} is not defined for both of {run} and {against}."
        if self.low is None or self.high is None:
            found = f"{run} and {against} differ in {title} by {self.value:+.4f}"
            return f"{found}; without an interval it is unknown whether that is chance."
        span = f"95 % interval {self.low:+.4f} to {self.high:+.4f}"
        if not self.is_clear:
            found = f"No significant difference between {run} and {against} in {title}"
            return f"{found}: {self.value:+.4f}, {span}, which spans 0."
        word = "better" if self.is_better else "worse"
        return f"{run} is {word} than {against} in {title}: {self.value:+.4f}, {span}."


@dataclass(frozen=True, kw_only=True)
class RunsCompared:
    """Runs compared with the first. `problems`: by name, why a run could not be compared."""

    impressions: int
    new_ad_impressions: int
    """Number of impressions of ads that the first run was not trained on."""
    users: int
    baseline: str
    differences: tuple[RunDifference, ...]
    notes: tuple[str, ...]
    problems: Mapping[str, str]

    def in_metric(self, metric: str) -> tuple[RunDifference, ...]:
        """List the differences in a metric."""
        return tuple(each for each in self.differences if each.metric == metric)

    @property
    def metrics(self) -> tuple[str, ...]:
        """List the metrics that were compared."""
        return tuple(dict.fromkeys(each.metric for each in self.differences))

    @property
    def verdicts(self) -> tuple[RunDifference, ...]:
        """List the main differences of each run: in GAUC, and in AUC of new ads."""
        shown = ("gauc", NEW_ADS)
        return tuple(each for metric in shown for each in self.in_metric(metric))


def quoted(name: str) -> str:
    """Quote the name of a run in a sentence."""
    return f"“{name}”"


def compare_runs(places: Places, names: Sequence[str], task: Task[Any]) -> RunsCompared:
    """Predict with all runs and compare each with the first, on the same resamples of users.

    Raises TrainerError, FeatureStoreError or TooMuchError if the first run cannot predict; problems of other runs are
    in `problems`.
    """
    from trainer.errors import CheckpointNotFoundError

    baseline = predictions_of(places, names[0], task)
    count, users = len(baseline.logit_N), len(set(baseline.impressions.user_N.tolist()))
    resamples = max(200, min(RESAMPLES, _MOST_RESAMPLED // max(1, count)))
    found: list[RunDifference] = []
    notes, problems = [f"{quoted(names[0])}: {each}" for each in baseline.notes], {}
    for done, name in enumerate(names[1:], 1):
        try:
            ours = predictions_of(places, name, task)
            task.tell(f"compares {quoted(name)} with {quoted(names[0])}", done, len(names))
            differences = _differences(ours, baseline, resamples)
        except CheckpointNotFoundError:
            problems[name] = Problem.NO_CHECKPOINT.of()
            continue
        except UserError as error:
            problems[name] = one_line(error)
            continue
        notes += [f"{quoted(name)}: {each}" for each in ours.notes]
        found += [
            RunDifference(**{**vars(each), "metric": metric, "run": name, "against": names[0]})
            for metric, each in differences.items()
        ]
    return RunsCompared(
        impressions=count,
        new_ad_impressions=0 if baseline.is_new_ad_N is None else int(baseline.is_new_ad_N.sum()),
        users=users,
        baseline=names[0],
        differences=tuple(found),
        notes=tuple(dict.fromkeys(notes)),
        problems=problems,
    )


def _differences(ours: "Predictions", baseline: "Predictions", resamples: int) -> Mapping[str, Difference]:
    """Compare two runs in all metrics of a page; new ads use the same resamples of users."""
    from trainer.evaluation.bootstrap import compare, new_to_both

    found, is_new_N = compare(ours, baseline, metrics=COMPARED, resamples=resamples), new_to_both(ours, baseline)
    if is_new_N.any():
        of_new = compare(ours, baseline, metrics=("auc",), resamples=resamples, only_N=is_new_N)
        found[NEW_ADS] = of_new["auc"]
    return found
