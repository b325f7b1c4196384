"""The data sets: simulated ones, made by the commands that anybody would type, and a person's own."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.problems import Problem
from featurestore.published.versions import open_published
from trainer.errors import DataError

JOBS = Path(__file__).parents[2] / "jobs"
NETS = ("dnn", "din", "dcnv2", "finalmlp")
SMALL_USERS, USERS = 1_200, 12_000


@dataclass(frozen=True)
class DataSet:
    """Samples, with a store of image features or without, and the batch size that fits them.

    Of a real log also its schema, and the days that are trained on, by which an epoch is chosen, and left out.
    """

    name: str
    samples: str
    store: str | None
    batch_size: int
    schema: str | None = None
    train_days: Sequence[str] | None = None
    test_days: Sequence[str] | None = None
    left_out_days: Sequence[str] | None = None

    def tuning_days(self) -> tuple[list[str], list[str]]:
        """Cut the training days into nine tenths, and a rest on which settings are chosen. Raises DataError."""
        from trainer.samples.columns import files_by_day

        by_day = files_by_day(open_published(self.samples))
        days = [day for day, files in by_day.items() if files[0].startswith("train/")]
        if len(days) < 2:
            raise DataError(Problem.TOO_FEW_TO_TUNE, self.samples, len(days))
        kept = len(days) - max(1, len(days) // 10)
        return days[:kept], days[kept:]


def parse(text: str, batch_size: int) -> DataSet:
    """Parse NAME=SAMPLES or NAME=SAMPLES:STORE. Raises ValueError."""
    name, equals, places = text.partition("=")
    samples, _, store = places.partition(":")
    if not equals or not name.isidentifier() or not samples:
        raise ValueError(Problem.NOT_NAMED_SAMPLES.of(text))
    return DataSet(name, samples, store or None, batch_size)


def simulated(folder: Path, users: int, photos: Path | None, labels: Path | None, batch_size: int) -> DataSet:
    """Simulate clicks of a number of people on drawn clothes, or on labelled photographs, unless they are there.

    Raises subprocess.CalledProcessError.
    """
    demo: list[object] = ["make_demo_data.py", "--out", folder, "--users", users]
    demo += ["--images", photos] if photos else []
    demo += ["--labels", labels] if labels else []
    pictures = photos or folder / "images"
    extract: list[object] = ["extract_features.py", "--images", pictures, "--store", folder / "features"]
    extract += ["--weights", "random:0"]
    samples: list[object] = ["build_samples.py", "--logs", folder / "logs", "--samples", folder / "samples"]
    if not (folder / "samples/summary.json").exists():
        for command in (demo, extract, samples):
            words = [sys.executable, str(JOBS / str(command[0])), *map(str, command[1:])]
            subprocess.run(words, check=True, stdout=sys.stderr)
    return DataSet(folder.name, str(folder / "samples"), str(folder / "features"), batch_size)
