"""The evaluation of a run, as python -m trainer.evaluate wrote it: report.json in its folder `evaluation`."""

from collections.abc import Mapping
from functools import lru_cache

from pydantic import BaseModel, ValidationError

from explorer.errors import ExplorerError
from featurestore.errors import StorageError
from featurestore.published.paths import RunPath, read_file
from featurestore.text.parsing import first_mistake, parse_json


class Estimate(BaseModel):
    """A value and its interval; None where one is not defined."""

    value: float | None
    low: float | None
    high: float | None


class Measured(BaseModel):
    """A set of impressions."""

    impressions: int
    users: int
    clicks: int
    metrics: Mapping[str, Estimate]


class SlicedBy(BaseModel):
    """The slices of one slicing, by name."""

    title: str
    slices: Mapping[str, Measured]


class ReliabilityBin(BaseModel):
    """Impressions with predictions of about one height."""

    impressions: int
    predicted: float
    clicked: Estimate


class Hidden(BaseModel):
    """Metrics with a share of the images hidden, and what that changed."""

    share: float
    impressions_without_ad_image: int
    metrics: Mapping[str, Estimate]
    gauc_change: Estimate


class Bootstrap(BaseModel):
    """How intervals were made."""

    resamples: int
    level: float


class Evaluation(BaseModel):
    """All that an evaluation measured; `missing_curve` is empty where it was not asked for."""

    checkpoint: str
    samples: str
    bootstrap: Bootstrap
    notes: list[str]
    whole: Measured
    sliced_by: Mapping[str, SlicedBy]
    reliability: list[ReliabilityBin]
    missing_curve: list[Hidden]


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
    return Evaluation.model_validate(parse_json(content))
