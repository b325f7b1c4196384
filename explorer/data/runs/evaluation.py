"""The evaluation of a run, as python -m trainer.evaluate wrote it: report.json in its folder `evaluation`."""

from dataclasses import dataclass
from functools import lru_cache

from pydantic import TypeAdapter, ValidationError

from explorer.errors import ExplorerError
from featurestore.errors import StorageError
from featurestore.parsing import first_mistake, parse_json
from featurestore.published.paths import RunPath, read_file
from trainer.evaluation.figures import Figures


@dataclass(frozen=True)
class Bootstrap:
    """How intervals were made."""

    resamples: int
    level: float


@dataclass(frozen=True, kw_only=True)
class Evaluation(Figures):
    """All that an evaluation measured, and of what."""

    checkpoint: str
    samples: str
    bootstrap: Bootstrap
    notes: list[str]


_EVALUATION = TypeAdapter(Evaluation)


def read_evaluation(run: RunPath) -> Evaluation | None:
    """Read the evaluation of a run; None where there is none. Raises ExplorerError where it cannot be read."""
    file = run / "evaluation" / "report.json"
    try:
        return _parsed(read_file(file))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ExplorerError(f"{file} is no evaluation of this version: {first_mistake(error)}") from error
    except (OSError, StorageError, ValueError) as error:
        raise ExplorerError(f"{file} cannot be read: {error}") from error


@lru_cache(maxsize=64)
def _parsed(content: bytes) -> Evaluation:
    return _EVALUATION.validate_python(parse_json(content))
