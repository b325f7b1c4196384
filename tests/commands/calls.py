"""Command lines, called in this process as a shell would call them: what they print, and the code they exit with."""

import contextlib
import importlib
import io
import shlex
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from featurestore.console.commandline import run_app

ROOT = Path(__file__).parent.parent.parent
JOBS = (
    "build_ad_index",
    "build_samples",
    "build_semantic_ids",
    "export_embeddings",
    "export_ids",
    "extract_features",
    "import_features",
    "import_xdl",
    "make_demo_data",
    "refresh_features",
)
MODULES = {
    "featurestore": "featurestore.__main__",
    "dask-submit": "pipeline.cluster.submit",
    **{f"trainer.{name}": f"trainer.{name}" for name in ("main", "evaluate")},
    **{
        f"trainer.{name}": f"trainer.{name}.__main__"
        for name in ("compat", "daily", "plan", "experiments", "prerank", "schema")
    },
    **{f"jobs/{name}": f"jobs.{name}" for name in JOBS},
    **{f"benchmarks.{name}": f"benchmarks.{name}" for name in ("extract", "refresh", "plan", "tables", "workload")},
    **{f"benchmarks.{name}": f"benchmarks.{name}.__main__" for name in ("resume", "train", "store")},
    "tools/demo": "tools.demo",
}
"""The first word of a line, and the module whose `app` it calls."""

MAY_BE_EMPTY = {"jobs/build_samples": ("--user-columns",), "jobs/import_xdl": ("--images", "--sparse", "--dense")}
"""As the commands themselves say."""


@dataclass(frozen=True)
class Called:
    """How a command line ended. `trace`: the traceback that a person would have seen."""

    code: int
    out: str
    err: str
    trace: str


def process_of(words: list[str]) -> list[str]:
    """The same command line for a process of its own, as the documentation writes it."""
    name, arguments = words[0], words[1:]
    if name == "dask-submit":
        return [str(Path(sys.executable).with_name(name)), *arguments]
    if "/" in name:
        return [sys.executable, str(ROOT / f"{name}.py"), *arguments]
    return [sys.executable, "-m", name, *arguments]


def words_of(line: str, places: Mapping[str, object]) -> list[str]:
    """The words of a line; `{name}` in a word is one of `places`, whatever characters that has."""
    return [word.format_map(places) for word in shlex.split(line)]


def call(words: list[str]) -> Called:
    """Call a command line in this process."""
    out, err, trace, code = io.StringIO(), io.StringIO(), "", 0
    with (
        mock.patch.object(sys, "argv", words),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            module = importlib.import_module(MODULES[words[0]])
            if words[0] == "dask-submit":
                module.main()
            else:
                run_app(module.app, words[0], may_be_empty=MAY_BE_EMPTY.get(words[0], ()))
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            code, trace = 1, traceback.format_exc()
    return Called(code, out.getvalue(), err.getvalue(), trace)
