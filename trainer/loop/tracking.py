"""MLflow and Weights & Biases next to TensorBoard: rank 0 tells them the settings, figures and addresses of a run.

Both are off unless `run.tracking` names one, and their packages are extras. Servers and projects are named by the
variables that they read themselves (MLFLOW_TRACKING_URI, WANDB_MODE, ...). A server far away may take minutes to answer
or to fail, so a tracker works in a thread of its own: the training never waits for it, and what goes wrong in it is one
warning.
"""

import contextlib
import os
import queue
import re
import time
from collections.abc import Callable, Mapping
from threading import Thread
from typing import Any

from featurestore.console.output import print_warning
from featurestore.parsing import parse_json
from featurestore.published.paths import read_file, write_json_file
from featurestore.spec import flat
from featurestore.storage.storage import Storage
from featurestore.text import one_line
from trainer.config import Tracking
from trainer.runs.open import Run, resumed_folder

Values = Mapping[str, float]
PROJECT = "crossmedia"
"""The experiment, or project, where the environment names none."""
FILE = "tracking.json"
"""In a run's folder: its id in each tracker, by which a run that is continued is found again."""
_END_S = 60.0
"""Longest wait, at the end of a run, for figures that a tracker has not taken yet."""
_LONGEST, _LONGEST_WHY = 500, 200


class MlflowRun:
    """A run in MLflow, of the experiment MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, name: str, params: Mapping[str, str], earlier: str | None) -> None:
        import mlflow

        if earlier is None:
            mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        self._mlflow, run = mlflow, mlflow.start_run(run_id=earlier, run_name=None if earlier else name)
        self.id: str = run.info.run_id
        plain = {_plain(each): value[:_LONGEST] for each, value in params.items()}
        mlflow.log_params({each: value for each, value in plain.items() if each not in run.data.params})  # never change

    def add(self, step: int, values: Values, time_s: float) -> None:
        """Log the values as metrics."""
        plain = {_plain(name): value for name, value in values.items()}
        self._mlflow.log_metrics(plain, step=step, timestamp=round(time_s * 1000))

    def end(self, failed: bool) -> None:
        """Set the run's status."""
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


class WandbRun:
    """A run in Weights & Biases, of the project WANDB_PROJECT."""

    def __init__(self, name: str, params: Mapping[str, str], earlier: str | None) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        settings = wandb.Settings(silent=True, console="off")
        kept: dict[str, Any] = {"id": earlier, "resume": "allow"} if earlier else {}
        self._run: Any = wandb.init(project=project, name=name, config=dict(params), settings=settings, **kept)
        self.id: str = self._run.id

    def add(self, step: int, values: Values, time_s: float) -> None:
        """Log the values, with the time of the step, as steps that are trained again come late."""
        self._run.log({**values, "time_s": time_s}, step=step)

    def end(self, failed: bool) -> None:
        """Send all that is left."""
        self._run.finish(exit_code=int(failed))


Tracker = MlflowRun | WandbRun
_KINDS: Mapping[Tracking, type[Tracker]] = {"mlflow": MlflowRun, "wandb": WandbRun}


class TrackerThread:
    """A tracker in a thread of its own: calls return at once; the first failure ends it with one warning."""

    def __init__(self, kind: Tracking, begin: Callable[[], Tracker]) -> None:
        self._kind, self._begin = kind, begin
        self._calls: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._has_failed = False
        self._thread = Thread(target=self._work, name=f"tracking by {kind}", daemon=True)
        self._thread.start()

    def add(self, step: int, values: Values) -> None:
        """Note the values of a step."""
        if not self._has_failed:
            now_s = time.time()
            self._calls.put(lambda tracker: tracker.add(step, values, now_s))

    def end(self, failed: bool) -> None:
        """Say that the run has ended, and wait until the tracker has taken everything, at most _END_S."""
        self._calls.put(lambda tracker: tracker.end(failed))
        self._calls.put(None)
        self._thread.join(_END_S)
        if self._thread.is_alive():
            print_warning(f"{self._kind} has not taken all figures within {_END_S:.0f} s; the run ends without it")

    def _work(self) -> None:
        try:
            tracker = self._begin()
            while (call := self._calls.get()) is not None:
                call(tracker)
        except ImportError:
            self._fail(f"it is not installed: pip install 'crossmedia[{self._kind}]'")
        except Exception as failure:  # of any package that a tracker uses
            self._fail(one_line(failure)[:_LONGEST_WHY])

    def _fail(self, why: str) -> None:
        self._has_failed = True
        print_warning(f"run.tracking={self._kind}: {why}; the run continues without it")


def tracker_of(run: Run) -> TrackerThread | None:
    """Begin to track a run, or continue; None where `run.tracking` names no tracker. Only rank 0 calls it."""
    kind = run.config.run.tracking
    if kind is None:
        return None
    params, file, continues = params_of(run), run.folder / FILE, resumed_folder(run) == run.folder

    def begin() -> Tracker:
        ids: dict[str, str] = {}
        with contextlib.suppress(FileNotFoundError):
            ids |= parse_json(read_file(file)) if continues else {}
        tracker = _KINDS[kind](run.folder.name, params, ids.get(kind))
        write_json_file(file, {**ids, kind: tracker.id})
        return tracker

    return TrackerThread(kind, begin)


def params_of(run: Run) -> dict[str, str]:
    """List all settings of a run, and where its samples and stores are, with digest and snapshot.

    A tracker is looked at from anywhere: below `read` are whole addresses, also where those of the settings are short.
    """
    places = {"folder": Storage(str(run.folder)).url, "samples": Storage(run.config.data.samples).url}
    stores = {
        name: {**store.model_dump(mode="json"), "url": Storage(store.url).url} for name, store in run.stores.items()
    }
    read = {**places, "samples_digest": run.origin.data["samples_digest"], "stores": stores}
    return {name: str(value) for name, value in flat({**run.config.model_dump(mode="json"), "read": read})}


def _plain(name: str) -> str:
    """Replace what MLflow refuses in a name."""
    return re.sub(r"[^\w\-. /]", "_", name)
