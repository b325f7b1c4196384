"""The part that jobs which write a store share: open or make it, stage under a run id, build shards, commit once.

A killed run continues: what it staged is found again under its run id, and the next run of the same id takes it over.
"""

import json
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import xxhash
from distributed import Client

from featurestore.errors import SpecMismatchError, StoreNotFoundError
from featurestore.format.datafile import FeatureRows
from featurestore.keys import Int64Array, key_of_uri, splitmix64
from featurestore.parsing import parse_json
from featurestore.spec import FileEntry, StoreInfo
from featurestore.staging import STAGING, QuarantineRow
from featurestore.store import FeatureStore, Snapshot
from pipeline.cluster.tasks import num_threads, run_all, wait_for_workers
from pipeline.problems import Problem

WORKERS_TIMEOUT_S = 60.0
SHARD_TASK_BYTES = 512 << 20  # staged for the shards of one task, which holds them: a task opens each part
SHARD_MEMORY_SHARE = 4  # a task's rows may take this part of its thread's memory; building copies a shard at a time
REPORT = ".json"  # how names of reports end
TOMBSTONES = "tombstones"  # parts of this name have no report
TOMBSTONES_PER_PART = 4096  # their blank features are held in memory


class BadRow(NamedTuple):
    """A row, or an image, for the quarantine. One without a key gets that of its place, which is its uri too."""

    key: int
    uri: str
    reason: str
    was_read: bool = True  # whether an image's bytes were seen: only then is it known to be bad itself

    @classmethod
    def at(cls, path: str, row: int, reason: str) -> "BadRow":
        """Make a row whose key is not known: `row` counts from 0 in the file at `path`."""
        uri = f"{path}#{row}"
        return cls(key_of_uri(uri), uri, reason)


@dataclass(frozen=True, kw_only=True)
class StagedReport:
    """The outcome for rows that one task staged; kept with them, so that a resumed run knows it."""

    num_rows: int
    bad: tuple[BadRow, ...] = ()

    @classmethod
    def load(cls, store: FeatureStore, run_id: str, name: str) -> Self:
        """Load the report of the part of this name in the run."""
        fields = parse_json(store.storage.read_bytes(f"{STAGING}/{run_id}/{name}{REPORT}"))
        return cls(**{**fields, "bad": tuple(BadRow(*bad) for bad in fields["bad"])})

    def save(self, store: FeatureStore, run_id: str, name: str) -> None:
        """Write the report."""
        store.storage.write_bytes(f"{STAGING}/{run_id}/{name}{REPORT}", json.dumps(asdict(self)).encode())


def find_store(url: str) -> FeatureStore | None:
    """Open the store at `url`; None where there is none."""
    try:
        return FeatureStore.open(url)
    except StoreNotFoundError:
        return None


def open_or_make(url: str, asked: Mapping[str, Any], **new: Any) -> FeatureStore:
    """Open the store at `url`, or make it when it is new.

    `asked` are fields of StoreInfo that the store must have, None: as it has them; its `dim` is that of the rows before
    a compact store reduces them. A new one gets those of `new` too. Raises SpecMismatchError when the store differs.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    store = find_store(url)
    if store is None:
        return FeatureStore.open_or_create(url, StoreInfo.model_validate(given | new))
    if store.info.reduction is not None:
        if given["dim"] != store.info.full_dim:
            raise SpecMismatchError(Problem.WRONG_WIDTH, store.url, store.info.full_dim, store.info.dim, given["dim"])
        given["dim"] = store.info.dim
    store.info.model_copy(update=given).check_same(store.info, f"the store at {store.url}")
    return store


def wait_for_worker(client: Client) -> None:
    """Return once the cluster has a worker. Raises ClusterError after a minute."""
    wait_for_workers(client, str(client.scheduler_info()["address"]), 1, WORKERS_TIMEOUT_S)


def run_id_of(*inputs: object) -> str:
    """Name a run by xxh3-128 of its inputs: equal inputs, equal name, so that a killed run finds what it staged."""
    return xxhash.xxh3_128_hexdigest(json.dumps(inputs).encode())


class StoreRun:
    """One run that writes a store: rows staged as parts under its run id, the quarantine, and at most one commit.

    `snapshot` is the state on which the run builds, `quarantined` are the rows in quarantine then; `staged` has the
    parts that an earlier run of the same id left, `parts` those that the commit will hold.
    """

    def __init__(self, client: Client, store: FeatureStore, run_id: str, snapshot: Snapshot) -> None:
        self.client = client
        self.store = store
        self.run_id = run_id
        self.snapshot = snapshot
        self.staged = frozenset(store.staged_parts(run_id))
        self.quarantined = store.quarantine_rows()
        self.parts: list[str] = []
        self.num_rows = 0  # in `parts`, which may be empty

    def remove(self, keys: Int64Array) -> None:
        """Stage tombstones."""
        self.num_rows += len(keys)
        keys = keys[np.argsort(splitmix64(keys))]  # so that one part meets few shards
        for start in range(0, len(keys), TOMBSTONES_PER_PART):
            chunk = keys[start : start + TOMBSTONES_PER_PART]
            name = f"{TOMBSTONES}-{run_id_of(chunk.tolist())}"
            self.parts.append(name)
            if name not in self.staged:
                self.store.stage_part(self.run_id, name, FeatureRows.tombstones(chunk, self.store.info))

    def quarantine(self, bad: Sequence[BadRow]) -> None:
        """Keep `bad` in the store's quarantine; what is there for the same reason stays as it is."""
        known = {(row.key, row.uri, row.reason) for row in self.quarantined}
        new = [row[:3] for row in dict.fromkeys(bad) if row[:3] not in known]
        self.store.add_quarantine([QuarantineRow(*row, time.time()) for row in new])

    def recovered(self, keys: Int64Array, bad: Sequence[BadRow]) -> list[QuarantineRow]:
        """List the rows in quarantine before the run whose keys are among `keys` and not `bad` now."""
        good = np.setdiff1d(keys, np.array([row.key for row in bad], np.int64))
        is_good = np.isin(np.array([row.key for row in self.quarantined], np.int64), good)
        return [row for row, is_here in zip(self.quarantined, is_good, strict=True) if is_here]

    def commit(self, operation: str, num_bad: int, settled: Sequence[QuarantineRow]) -> int:
        """Commit the parts if they have rows, drop `settled` from the quarantine, and return the newest version.

        Staging is gone then.
        """
        if self.num_rows:
            entries = build_shards(self.client, self.store, self.run_id, self.parts)
            self.snapshot = self.store.commit(entries, operation, num_quarantined=num_bad)
        self.store.discard_staging(self.run_id)
        self.store.resolve_quarantine(settled)
        return self.snapshot.version


def build_shards(client: Client, store: FeatureStore, run_id: str, parts: Sequence[str]) -> dict[int, FileEntry]:
    """Build the data files of all shards that have rows in `parts` of the run, on the cluster.

    Every task opens every part, 8 at a time, so there are few: one for each thread of the cluster, and more where the
    rows of one would be above 512 MB or a quarter of its thread's share of the worker's memory; never less than a
    shard. Raises KeyCollisionError, InvalidRowsError where a part is gone; ClusterError where the workers die of it.
    """
    num_shards = store.info.num_shards
    staged_bytes = sum(entry.size_bytes for entry in store.storage.entries(f"{STAGING}/{run_id}"))
    num_tasks = max(num_threads(client), staged_bytes // shard_task_bytes(client) + 1)
    starts = sorted({num_shards * task // num_tasks for task in range(num_tasks)})
    ranges = [range(start, end) for start, end in zip(starts, [*starts[1:], num_shards], strict=True)]
    calls = [(store, run_id, shards, parts) for shards in ranges]
    built = run_all(client, "building shards", FeatureStore.build_shards, calls, "more shards need less memory each")
    return {shard: entry for entries in built for shard, entry in entries.items()}


def shard_task_bytes(client: Client) -> int:
    """Count the bytes of rows that one task may hold on the smallest worker, whose threads all have one."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    rooms: list[int] = [worker["memory_limit"] // worker["nthreads"] // SHARD_MEMORY_SHARE for worker in workers]
    return min([SHARD_TASK_BYTES, *(room for room in rooms if room)])  # 0: no limit


def describe_bad(bad: Collection[BadRow], num_names: int = 3) -> str:
    """List the reasons with their numbers and the first names."""
    texts = []
    for reason, count in Counter(row.reason for row in bad).most_common():
        names = [row.uri for row in bad if row.reason == reason]
        more = ", …" if count > num_names else ""
        texts.append(f"{count:,} {reason} ({', '.join(names[:num_names])}{more})")
    return "; ".join(texts)
