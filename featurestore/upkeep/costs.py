"""What the rows of a store have cost: seconds and images of each extraction and refresh, kept in the store for people.

reports/extraction-00000000000000000003.json    of the job that made snapshot 3
"""

from typing import Annotated

from pydantic import Field

from featurestore.spec import Sealed, Version, read_sealed, seal
from featurestore.storage.storage import Storage

_FOLDER, _PREFIX = "reports", "extraction-"
Count = Annotated[int, Field(ge=0)]


class ExtractionCost(Sealed):
    """One job: `num_computed` images went through the network in its own `seconds`; reading and writing are in them."""

    version: Version
    operation: str
    num_computed: Count
    seconds: Annotated[float, Field(ge=0)]
    num_workers: Count  # threads of the cluster


def keep_cost(storage: Storage, cost: ExtractionCost) -> None:
    """Keep what a job has cost."""
    storage.write_bytes(f"{_FOLDER}/{_PREFIX}{cost.version:020d}.json", seal(cost))


def seconds_per_image(storage: Storage, until: int) -> float | None:
    """Return the mean seconds of an image over all jobs up to a snapshot; None where none was kept.

    Raises CorruptFileError.
    """
    names = [name for name in storage.list(_FOLDER) if name.startswith(_PREFIX)]
    costs = [read_sealed(storage, f"{_FOLDER}/{name}", ExtractionCost) for name in names]
    counted = [cost for cost in costs if cost.version <= until and cost.num_computed]
    images = sum(cost.num_computed for cost in counted)
    return sum(cost.seconds for cost in counted) / images if images else None
