"""What the runs learn from, looked at once: all runs of a call see the same days, samples and snapshots."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

from featurestore.format.codec import Basis
from featurestore.identity import SnapshotId
from featurestore.published import open_published
from featurestore.published.paths import RunPath
from featurestore.snapshot import Snapshot
from featurestore.store import FeatureStore
from featurestore.text import DType
from featurestore.upkeep.history import seconds_per_image
from featurestore.upkeep.remake import principal_components, remake
from trainer.comm import Comm
from trainer.config.config import Config
from trainer.errors import DataError, DataNotFoundError
from trainer.runs.checkpoint import samples_digest
from trainer.runs.stores import StorePlace, missing_places
from trainer.samples.columns import files_by_day
from trainer.samples.reader import open_index
from trainer.schema import Schema

Found = TypeVar("Found")
LEAST_DAYS = 3
_DIGITS = 10


class Sources:
    """Samples and stores by their places. Every rank calls the same functions; all raise together."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._seen: dict[tuple[Any, ...], Any] = {}

    def days(self, samples: str) -> list[str]:
        """List the days of the samples, ascending. Raises DataError where they are too few for a warm-up."""

        def look() -> list[str]:
            days = list(files_by_day(open_published(samples)))
            if len(days) < LEAST_DAYS:
                raise DataError(
                    f"data.samples={samples} has {len(days)} days of samples; warm-up from the day before needs"
                    f" {LEAST_DAYS} at least, in files that begin with day=2026-01-31 (jobs/build_samples.py writes"
                    " them)"
                )
            return days

        return self._once(("days", samples), lambda: self._comm.on_rank_0(look))

    def digest(self, config: Config, schema: Schema, split: Literal["train", "test"]) -> str:
        """Compute the digest of the files that the run learns from, or is tested on: of names, counts and bytes.

        Raises DataError, SchemaError, as the run would.
        """
        data = config.data
        days = data.train_days if split == "train" else data.test_days

        def look() -> str:
            index = open_index(self._comm, data.samples, split, schema, days)
            return samples_digest(self._comm, index, data.cache_dir)

        return self._once(("digest", data.samples, split, data.schema_file, str(days)), look)

    def snapshot(self, place: StorePlace) -> SnapshotId:
        """Find the snapshot to train on. Raises DataError, FeatureStoreError."""

        def look() -> SnapshotId:
            if problems := missing_places([place]):
                raise DataNotFoundError("\n".join(problems))
            return SnapshotId.of(FeatureStore.open(place.url).snapshot(place.version))

        return self._once(("snapshot", place), lambda: self._comm.on_rank_0(look))

    def reduced(self, config: Config, dims: int, dtype: DType, folder: RunPath) -> str | None:
        """Find or make the compact store of the snapshot of data.store that is to be trained on, in `folder`.

        None where the store's rows have no more than `dims` dimensions. Raises FeatureStoreError.
        """
        data = config.data

        def look() -> str | None:
            store = FeatureStore.open(data.store)
            snapshot = store.snapshot(data.store_version)
            if dims >= min(snapshot.info.dim, snapshot.num_rows):
                return None
            place = str(folder / f"{snapshot.manifest.commit_id[:_DIGITS]}-{dims}-{dtype}")
            remake(store, place, dims=dims, dtype=dtype, version=snapshot.version, find=self._components)
            return place

        return self._once(("reduced", data.store, dims, dtype), lambda: self._comm.on_rank_0(look))

    def facts(self, config: Config) -> dict[str, Any]:
        """Say what is known of the snapshot that data.store is at. Raises FeatureStoreError."""
        data = config.data
        return self._once(
            ("facts", data.store, data.store_version),
            lambda: self._comm.on_rank_0(lambda: facts_of(FeatureStore.open(data.store).snapshot(data.store_version))),
        )

    def _components(self, snapshot: Snapshot, dims: int) -> Basis:
        """Find the components for all widths at once, with the first that is asked for, which is the greatest."""
        key = "components", snapshot.storage.url, snapshot.version
        basis: Basis = self._once(key, lambda: principal_components(snapshot, dims))
        return basis.first(dims) if dims <= basis.dim else principal_components(snapshot, dims)

    def _once(self, key: tuple[Any, ...], look: Callable[[], Found]) -> Found:
        if key not in self._seen:
            self._seen[key] = look()
        return cast("Found", self._seen[key])


def facts_of(snapshot: Snapshot) -> dict[str, Any]:
    """Describe a snapshot: network, numbers of a row, dtype, images, bytes, and seconds of an image's extraction.

    The seconds are there where the store has kept them.
    """
    info = snapshot.info
    return {
        "store": snapshot.storage.url,
        "snapshot": snapshot.version,
        "commit_id": snapshot.manifest.commit_id,
        "network": f"{info.extractor.backbone} {info.extractor.layer}".removeprefix("torchvision "),
        "numbers": info.width_text,
        "dtype": info.dtype,
        "images": snapshot.num_rows,
        "bytes": snapshot.manifest.file_bytes,
        "seconds_per_image": seconds_per_image(snapshot.storage, snapshot.version),
    }
