"""Pages of runs: the list, one run, several side by side, the value of images, and the model published of one."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from explorer.data.runs import comparing
from explorer.data.runs.comparing import (
    IMAGES,
    TITLES,
    SettingRow,
    compare_runs,
    differing,
    image_groups,
    read_evaluation,
)
from explorer.data.runs.curves import CurveReader, Curves, StageTime, stages_of_report
from explorer.data.runs.folders import METRICS, RunFacts, open_run, read_facts, read_runs, run_names, trained_runs
from explorer.errors import ExplorerError, tried
from explorer.html.query import Paging
from explorer.html.site import NavItem, PageKind, Part, Question, Site
from explorer.problems import Problem
from featurestore.errors import FeatureStoreError, StorageError
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from featurestore.text import one_line
from serving.bundle.files import newest_vectors
from serving.bundle.log import known_versions, list_versions, read_version

_PER_PAGE = 50
_MOST_COLUMNS = 4
"""Settings in the list of runs."""
_MOST_COMPARED, _MOST_GROUPS = 6, 10
_AGAIN_S = 4
"""Seconds between two looks at the curves of a run that is training."""
_MOST_LOOKED_AT = 200
"""Number of runs that are searched for those that differ only in their images."""
_WORTH = "What the images are worth"
_CHANGED, _NAME, _STATE = "changed", "name", "state"
_REPORTED = {"steps": "global_step", "took": "wall_s"}
"""Columns of the list of runs to sort by, and where a report has them."""


class RunPages(PageKind):
    """Pages below /runs."""

    needs = "runs"
    nav = NavItem("Runs", "/runs")
    questions = (
        Question(
            "What are the images worth?",
            "/worth",
            "Runs side by side whose images alone differ, and whether their difference is chance.",
        ),
        Question(
            "How is the training going?", "/runs", "All runs, their curves and settings; two to six side by side."
        ),
    )

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._curves = CurveReader()

    def routes(self) -> Sequence[Route]:
        """List the routes."""
        return [
            Route("/runs", self.overview),
            Route("/runs/compare", self.compare),
            Route("/worth", self.worth),
            Route("/runs/{name}", self.run),
            Route("/runs/{name}/{day}", self.run),
        ]

    def close(self) -> None:
        """Remove copies of files."""
        self._curves.close()

    def overview(self, request: Request) -> Response:
        """Show the runs, last changed first or sorted by a column, with the settings in which they differ."""
        names, by = run_names(self.site.places), request.query_params.get("sort") or _CHANGED
        paging = Paging.of(request, len(names), _PER_PAGE)
        if by != _CHANGED:
            names = [run.name for run in in_order(read_runs(self.site.places, names), by)]
        runs = read_runs(self.site.places, names[paging.first : paging.first + _PER_PAGE])
        rows = [row for row in differing(runs) if row.is_figure][:_MOST_COLUMNS] if runs else []
        shown = {
            "runs": runs,
            "columns": [row.name for row in rows] or ["model.base", IMAGES],
            "value": lambda run, name: comparing.text_of(run.settings[name]) if name in run.settings else "–",
            "paging": paging,
            "sort": by,
            "group": [run.name for run in next(iter(image_groups(runs)), [])],
        }
        return self._page(request, "Runs", Part(template="runs/list.html", values=shown))

    def run(self, request: Request) -> Response:
        """Show one run, or a day of trainer.daily."""
        return self._one(request, "/".join(request.path_params.values()))

    def _one(self, request: Request, name: str) -> Response:
        folder = open_run(self.site.places, name)
        facts = read_facts(folder, name)

        def measured() -> dict[str, Any]:
            evaluation, problem = tried(lambda: read_evaluation(folder))
            command = f"crossmedia evaluate {shlex.quote(str(folder))}"
            return {"evaluation": evaluation, "evaluation_problem": problem, "command": command}

        settings = [(name, comparing.text_of(value)) for name, value in facts.settings.items()]
        live = self._live([facts])
        return self._page(
            request,
            f"Run {name}",
            Part(template="runs/run.html"),
            *live.parts(),
            Part(template="runs/stages.html", values={"times": live.stages(facts)}),
            Part(template="runs/evaluation.html", values=measured),
            Part(template="runs/settings.html", values={"settings": settings, "stores": _stores(facts)}),
            run=facts,
            has_charts=True,
        )

    def compare(self, request: Request) -> Response:
        """Show two to six runs side by side."""
        if "run" not in request.query_params and "compare" in run_names(self.site.places):
            return self._one(request, "compare")
        names = list(dict.fromkeys(request.query_params.getlist("run")))
        if not 2 <= len(names) <= _MOST_COMPARED:
            raise ExplorerError(Problem.OTHER_COUNT, _MOST_COMPARED, len(names))
        runs = [read_facts(open_run(self.site.places, name), name) for name in names]
        return self._several(request, runs)

    def worth(self, request: Request) -> Response:
        """Show runs side by side that differ only in their images."""
        runs = read_runs(self.site.places, run_names(self.site.places)[:_MOST_LOOKED_AT])
        groups = image_groups(runs)
        if not groups:
            run = next(iter(trained_runs(self.site.places)), None)
            sees = "both" if run and run.images == "none" else "none"
            command = run and _again(str(self.site.places.run(run.name)), f"{run.name.replace('/', '-')}-{sees}", sees)
            none = Part(template="runs/no-worth.html", values={"command": command, "sees": sees})
            return self._page(request, _WORTH, none)
        others = [[run.name for run in group] for group in groups[1:][:_MOST_GROUPS]]
        return self._several(request, groups[0], others)

    def _several(
        self, request: Request, runs: Sequence[RunFacts], others: Sequence[Sequence[str]] | None = None
    ) -> Response:
        """Show runs side by side; `others`: given if they differ in their images alone, further groups that do."""
        places, names, rows = self.site.places, [run.name for run in runs], differing(runs)
        task = self.site.background.task(
            repr(("differences", names, [run.checkpoint for run in runs])),
            lambda task: compare_runs(places, names, task),
        )

        def measured() -> dict[str, Any]:
            found, problem = tried(task.result)
            commands = _commands([str(places.run(name)) for name in names])
            return {"found": found, "problem_of_all": problem, "commands": commands}

        def compared() -> dict[str, Any]:
            return {
                "rows": [*comparing.snapshots(runs), *(row for row in rows if row.is_figure)],
                "other_rows": [row for row in rows if not row.is_figure],
                "evaluations": {name: tried(partial(read_evaluation, places.run(name)))[0] for name in names},
                "first": lambda name: [name, *(each for each in names if each != name)],
            }

        about = Part(template="runs/compare.html", values=compared)
        heading, here = "Differences", others is None
        verdicts = Part(
            template="runs/verdicts.html",
            values=measured,
            heading=heading if here else "",
            task=task,
            what="Measuring the differences",
        )
        first = (about, verdicts) if others is None else (Part(template="runs/worth.html"), verdicts, about)
        return self._page(
            request,
            "Runs side by side" if others is None else _WORTH,
            *first,
            Part(template="runs/differences.html", values=measured, heading="" if here else heading, task=task),
            *self._live(runs).parts(),
            runs=runs,
            names=names,
            is_worth=others is not None,
            others=others,
            has_charts=True,
        )

    def _page(self, request: Request, title: str, *parts: Part, **shared: Any) -> Response:
        return self.site.page(request, title, *parts, metrics=METRICS, titles=TITLES, **shared)

    def _live(self, runs: Sequence[RunFacts]) -> "LiveCurves":
        """Read the curves of the runs."""
        by_run, problems = {}, []
        for run in runs:
            try:
                by_run[run.name] = self._curves.read(self.site.places.run(run.name))
            except (OSError, StorageError, ValueError) as error:
                problems.append(Problem.UNREADABLE_CURVES.of(run.name, one_line(error)))
        return LiveCurves(runs=runs, curves=by_run, problems=problems)


@dataclass(kw_only=True)
class LiveCurves:
    """The current curves of one or several runs."""

    runs: Sequence[RunFacts]
    curves: Mapping[str, Curves]
    problems: Sequence[str]

    @property
    def is_running(self) -> bool:
        """Return whether one of them is training."""
        return any(run.state == "running" for run in self.runs)

    def parts(self) -> Sequence[Part]:
        """Return the parts of a page that show them: charts, asked for again while a run trains, and numbers."""
        shown = {"live": self, "again_s": _AGAIN_S if self.is_running else None}
        return (
            Part(template="runs/curves.html", values=shown, heading="Curves"),
            Part(template="runs/numbers.html", values={"live": self}),
        )

    @property
    def loss(self) -> Mapping[str, Any]:
        """The loss of each run that has logged it."""
        return {name: each.loss for name, each in self.curves.items() if each.loss.steps}

    def test(self, metric: str) -> Mapping[str, Any]:
        """Return the curves of a metric of the samples that are evaluated, one for each run that was evaluated."""
        return {name: each.test(metric) for name, each in self.curves.items() if each.test(metric).steps}

    @property
    def tests(self) -> list[str]:
        """Metrics that at least one run has."""
        return [metric for metric in METRICS if self.test(metric)]

    @property
    def drawn_tests(self) -> list[str]:
        """Metrics with a curve: at least one run was evaluated several times."""
        return [metric for metric in self.tests if any(len(each.steps) > 1 for each in self.test(metric).values())]

    def stages(self, run: RunFacts) -> tuple[StageTime, ...]:
        """Return the stages of a finished run's report, else those of the last logged step."""
        return stages_of_report(run.report) or (self.curves[run.name].stages if run.name in self.curves else ())


def in_order(runs: Sequence[RunFacts], by: str) -> list[RunFacts]:
    """Sort runs by a column of their list: the best metric first, other numbers from the largest on, texts by letter.

    Runs without a value come last; equal ones stay in their order. `by` may be a setting that one of them has. Raises
    ExplorerError for any other word.
    """
    fixed = (_NAME, *METRICS, _STATE, *_REPORTED)
    if by not in fixed and not any(by in run.settings for run in runs):
        raise ExplorerError(Problem.UNKNOWN_SORT, by[:40], ", ".join((_CHANGED, *fixed)))

    def value(run: RunFacts) -> Any:
        if by in (_NAME, _STATE):
            return getattr(run, by)
        if by in METRICS:
            return run.metrics.get(by)
        return run.report.get(_REPORTED[by]) if by in _REPORTED else run.settings.get(by)

    def place(run: RunFacts) -> tuple[int, float, str]:
        found = value(run)
        if found is None:
            return 2, 0.0, ""
        if isinstance(found, int | float):
            return 0, found if by == "logloss" else -found, ""
        return 1, 0.0, comparing.text_of(found)

    return sorted(runs, key=place)


def _again(folder: str, name: str, images: str) -> str:
    """Write the command that trains a run again with other images, under another name."""
    config = shlex.quote(f"{folder}/config.yaml")
    new = shlex.quote(f"run.name={name}")
    return f"crossmedia train --config {config} --set run.resume=null --set model.images={images} --set {new}"


def _commands(folders: Sequence[str]) -> list[str]:
    """Write the commands that compare runs with the first."""
    against = f"--against {shlex.quote(folders[0])}"
    return [f"crossmedia evaluate {shlex.quote(folder)} {against}" for folder in folders[1:]]


def _stores(facts: RunFacts) -> list[SettingRow]:
    """List the stores of a finished run: name, address, snapshot, commit."""
    stores = facts.report.get("stores")
    if not isinstance(stores, dict):
        return []
    return [
        SettingRow(str(name), tuple(str(each.get(key, "–")) for key in ("url", "version", "commit_id")), True)
        for name, each in stores.items()
        if isinstance(each, dict)
    ]


MODEL = "/model"
_MOST_VERSIONS = 50


class ModelPages(PageKind):
    """The page at /model."""

    needs = "model"
    nav = NavItem("Model", MODEL)
    questions = (
        Question(
            "Which model is in use, and how old are its vectors?",
            MODEL,
            "The versions of the published model, the run of each, and the snapshots of its vectors.",
        ),
    )

    def routes(self) -> Sequence[Route]:
        """Return the route of the one page."""
        return [Route(MODEL, self.model)]

    def model(self, request: Request) -> Response:
        """Show the versions and the vectors of the one in use."""
        assert self.site.places.model is not None
        storage = Storage(self.site.places.model)
        in_use = read_version(storage)
        shown = {
            "url_of_model": storage.url,
            "in_use": in_use,
            "vectors": newest_vectors(storage, in_use),
            "versions": list_versions(storage, _MOST_VERSIONS),
            "num_versions": len(known_versions(storage)),
            "newest_of": _newest_of,
            "metrics": METRICS,
            "titles": TITLES,
        }
        return self.site.page(request, "Model", Part(template="model.html", values=shown))


def _newest_of(url: str) -> int | None:
    """Return the number of a feature store's newest snapshot; None if it cannot be read."""
    try:
        return FeatureStore.open(url).snapshot().version
    except FeatureStoreError:
        return None
