"""The identity of a snapshot: kept by all that is made of its rows, and compared with a store before they are used."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from featurestore import log
from featurestore.errors import AnotherStoreError
from featurestore.snapshot import Snapshot
from featurestore.spec import OptionalId, RandomId, SourceSnapshot
from featurestore.storage.storage import Storage

VECTORS_OF = "visual_vectors"  # in the metadata of exported vectors (Parquet): what they are of, as JSON
_SHOWN = 8  # digits of an id that show at a glance that it is another


class SnapshotId(BaseModel):
    """Store and commit of a snapshot, by random ids: a store that was made anew has others, also at the same place."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    url: str
    version: int
    store_id: RandomId
    commit_id: OptionalId  # empty of an empty store, which has no commit

    @classmethod
    def of(cls, snapshot: Snapshot) -> "SnapshotId":
        """Return the id of an open snapshot."""
        return cls(
            url=snapshot.storage.url,
            version=snapshot.version,
            store_id=snapshot.info.store_id,
            commit_id=snapshot.manifest.commit_id,
        )

    @classmethod
    def of_source(cls, source: SourceSnapshot) -> "SnapshotId":
        """Return the id of the snapshot that another store's rows are made of."""
        return cls(**source.model_dump())

    def as_source(self) -> SourceSnapshot:
        """Return what a store keeps whose rows are made of this snapshot's."""
        return SourceSnapshot(**self.model_dump())

    def named(self) -> dict[str, Any]:
        """Return the fields of a report: store, snapshot, store_id, commit_id."""
        return {"store": self.url, "snapshot": self.version, "store_id": self.store_id, "commit_id": self.commit_id}

    @classmethod
    def from_named(cls, report: Mapping[str, Any]) -> "SnapshotId | None":
        """Read the fields of `named` from a report; None where it names no snapshot."""
        if "store" not in report or "snapshot" not in report:
            return None
        ids = {name: str(report[name]) for name in ("store_id", "commit_id")}
        return cls(url=str(report["store"]), version=int(report["snapshot"]), **ids)

    def described(self) -> str:
        """Format for a message: `snapshot 3 (commit 0a1b2c3d) of store 4e5f6a7b at URL`."""
        commit = self.commit_id[:_SHOWN] or "none"
        return f"snapshot {self.version} (commit {commit}) of store {self.store_id[:_SHOWN]} at {self.url}"

    def is_same(self, found: "SnapshotId") -> bool:
        """Return whether `found` is this snapshot or another one of its store.

        Equal numbers must be one commit. Other numbers must be of one store: of one id, or, where store.json was made
        anew, with this commit in the log of `found`. Reads a small file for the latter; raises FeatureStoreError.
        """
        if self.commit_id and self.version == found.version:
            return self.commit_id == found.commit_id
        if self.store_id == found.store_id:
            return True
        kept = log.find(Storage(found.url), self.version)
        return kept is not None and kept.commit_id == self.commit_id

    def check(self, found: "SnapshotId", what: str, way_out: str) -> None:
        """Raise AnotherStoreError where `found` is of another store.

        `what` (a checkpoint, an index) has rows of this one. A store that was copied, restored, compacted or repaired
        is the same."""
        if not self.is_same(found):
            raise AnotherStoreError(
                f"{what} belongs to {self.described()}. This is {found.described()}: another store of the same kind, "
                f"whose features may differ; {way_out}"
            )
