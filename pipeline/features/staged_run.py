"""One run on its cluster: digests, parts, copies and tombstones staged under its id, and shards built of them."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from distributed import Client

from featurestore.console.progress import progress
from featurestore.errors import InvalidRowsError, KeyCollisionError
from featurestore.format.rows import FeatureRows
from featurestore.keys import Int64Array, splitmix64
from featurestore.spec import FileEntry
from featurestore.staging import STAGING
from featurestore.store import FeatureStore
from pipeline.cluster.tasks import Killed, num_threads, run_alone, run_tasks
from pipeline.errors import ExtractionError
from pipeline.features.copy_part import copy_part
from pipeline.features.diff import Copy, Part, make_copy_parts, make_parts, run_id_of
from pipeline.features.part import (
    PartReport,
    PartSettings,
    check_part,
    digest_images,
    extract_part,
    host_of,
    in_order,
    try_image,
    without_unread,
)
from pipeline.images.source import ImageRef

DIGESTS_PER_TASK = 1024
SHARD_TASK_BYTES = 512 << 20  # staged for the shards of one task, which holds them: a task opens each part
SHARD_MEMORY_SHARE = 4  # a task's rows may take this part of its thread's memory; building copies a shard at a time
TOMBSTONES_PER_PART = 4096  # their blank features are held in memory
REPORT_THREADS = 8
COPIES, TOMBSTONES = "copies", "tombstones"  # parts with these names have no report


def digest_all(client: Client, refs: Sequence[ImageRef]) -> dict[int, bytes]:
    """xxh3-128 of the bytes of each image, by key; empty or missing where it cannot be read."""
    chunks = [refs[i : i + DIGESTS_PER_TASK] for i in range(0, len(refs), DIGESTS_PER_TASK)]
    digests: dict[int, bytes] = {}
    with progress("comparing", len(refs)) as advance:
        for index, found in run_tasks(client, digest_images, [(chunk,) for chunk in chunks]):
            advance(len(chunks[index]))
            if not isinstance(found, Killed):  # then equal images are computed twice, and equally
                digests |= {ref.key: digest for ref, digest in zip(chunks[index], found, strict=True)}
    return digests


def workers_per_host(client: Client) -> dict[str, int]:
    """How many workers share each host's cores."""
    return dict(Counter(host_of(address) for address in client.scheduler_info(n_workers=-1)["workers"]))


class Run:
    """The parts of one run. What an earlier, killed run of the same id has staged is taken over, not repeated.

    `is_dry`: images are decoded, so that the counts are right, and nothing is written.
    """

    def __init__(self, client: Client, store: FeatureStore, settings: PartSettings, part_size: int, is_dry: bool):
        self._client = client
        self._store = store
        self._settings = settings
        self._part_size = part_size
        self._is_dry = is_dry
        self._staged = frozenset(store.staged_parts(settings.run_id))
        self._parts: list[str] = []  # what the commit will hold
        self._num_rows = 0
        self.num_resumed = 0  # images in parts that were staged before

    def compute(
        self, refs: Sequence[ImageRef], digests: Mapping[int, bytes], before: Callable[[], None]
    ) -> list[PartReport]:
        """The reports of parts with all `refs`, staged now or before; `before` is called if anything is left to do."""
        reports, covered = self._taken_over(refs)
        self.num_resumed += len(covered)
        waiting = make_parts(
            [ref for ref in refs if ref.key not in covered], lambda ref: digests.get(ref.key, b""), self._part_size
        )
        if waiting and not self._is_dry:
            before()
        work = check_part if self._is_dry else extract_part
        suspects = []
        with progress("decoding" if self._is_dry else "extracting", len(refs), len(covered)) as advance:
            calls = [(self._settings, part.name, part.refs) for part in waiting]
            for index, report in run_tasks(self._client, work, calls):
                if isinstance(report, Killed):
                    suspects.append(waiting[index])
                    continue
                reports.append(report)
                advance(len(waiting[index].refs))
            for part in suspects:
                reports.append(self._compute_suspect(work, part))
                advance(len(part.refs))
        self._parts += [part.name for part in waiting]
        self._num_rows += sum(report.num_rows for report in reports)
        return reports

    def copy(self, copies: Iterable[Copy], version: int) -> None:
        """Stage rows of images that snapshot `version` has the bytes of."""
        parts = make_copy_parts(copies, self._part_size, COPIES)
        self._parts += [part.name for part in parts]
        self._num_rows += sum(len(part.copies) for part in parts)
        if self._is_dry:
            return
        waiting = [part for part in parts if part.name not in self._staged]
        calls = [(self._store, self._settings.run_id, part.name, version, part.copies) for part in waiting]
        with progress("copying", sum(len(part.copies) for part in waiting)) as advance:
            for index, done in run_tasks(self._client, copy_part, calls):
                if isinstance(done, Killed):
                    raise ExtractionError("copying rows brings the workers down: try a smaller --part-size")
                advance(len(waiting[index].copies))

    def remove(self, keys: Int64Array) -> None:
        """Stage tombstones."""
        self._num_rows += len(keys)
        keys = keys[np.argsort(splitmix64(keys))]  # so that one part meets few shards
        for start in range(0, len(keys), TOMBSTONES_PER_PART):
            chunk = keys[start : start + TOMBSTONES_PER_PART]
            name = f"{TOMBSTONES}-{run_id_of(chunk.tolist())}"
            self._parts.append(name)
            if name not in self._staged and not self._is_dry:
                self._store.stage_part(self._settings.run_id, name, FeatureRows.tombstones(chunk, self._store.info))

    @property
    def has_rows(self) -> bool:
        """Whether a commit would change anything: parts of bad images alone are empty."""
        return self._num_rows > 0

    def build_shards(self) -> dict[int, FileEntry]:
        """The data files of all shards that got rows."""
        return build_shards(self._client, self._store, self._settings.run_id, self._parts)

    def discard(self) -> None:
        """Remove what was staged."""
        if not self._is_dry:
            self._store.discard_staging(self._settings.run_id)

    def _taken_over(self, refs: Iterable[ImageRef]) -> tuple[list[PartReport], set[int]]:
        """Reports of the staged parts whose images are all among `refs`, unchanged; and the keys of these images.

        So the parts outlive a listing that has changed since, but for those with an image that did. Images that could
        not be read are left to do, as that may have been for a moment: the reports are without them.
        """
        names = [name for name in sorted(self._staged) if not name.startswith((COPIES, TOMBSTONES))]
        reports: list[PartReport] = []
        covered: set[int] = set()
        if not names:
            return reports, covered
        left = {(ref.key, ref.source_tag) for ref in refs}
        loaded = in_order(self._load_report, names, REPORT_THREADS, 2 * REPORT_THREADS)
        for name, report in zip(names, loaded, strict=True):
            if report is None:
                continue
            if not report.images:
                if not self._is_dry:  # a new part may have its name, and writes its report before its rows
                    self._store.discard_part(self._settings.run_id, name)
            elif left.issuperset(report.images):
                left.difference_update(report.images)
                covered.update(key for key, _ in report.images)
                reports.append(report)
                self._parts.append(name)
        return reports, covered

    def _load_report(self, part: str) -> PartReport | None:
        try:
            return without_unread(PartReport.load(self._store.url, self._settings.run_id, part))
        except FileNotFoundError:  # expiry removes what was staged long ago
            return None

    def _compute_suspect(self, work: Callable[..., PartReport], part: Part) -> PartReport:
        """A part that ran when workers died, now alone, without the images that bring a worker down by themselves."""
        tried = {ref.key: run_alone(self._client, try_image, self._settings, ref) for ref in part.refs}
        deadly = {key for key, result in tried.items() if isinstance(result, Killed)}
        report: PartReport | Killed = run_alone(self._client, work, self._settings, part.name, part.refs, 1, deadly)
        if isinstance(report, Killed):
            raise ExtractionError(
                f"workers die while they compute {part.refs[0].uri} and {len(part.refs) - 1} more images, though each"
                " can be decoded: give workers more memory, or set a smaller --batch-size"
            )
        return report


def build_shards(client: Client, store: FeatureStore, run_id: str, parts: list[str]) -> dict[int, FileEntry]:
    """The data files of all shards that have rows in `parts` of the run, built on the cluster.

    Every task opens every part, 8 at a time, so there are few: one for each thread of the cluster, and more where the
    rows of one would be above 512 MB or a quarter of its thread's share of the worker's memory; never less than a
    shard. Raises KeyCollisionError, InvalidRowsError where a part is gone; ExtractionError where the workers die of it.
    """
    num_shards = store.info.num_shards
    staged_bytes = sum(entry.size_bytes for entry in store.storage.entries(f"{STAGING}/{run_id}"))
    num_tasks = max(num_threads(client), staged_bytes // shard_task_bytes(client) + 1)
    starts = sorted({num_shards * task // num_tasks for task in range(num_tasks)})
    ranges = [range(start, end) for start, end in zip(starts, [*starts[1:], num_shards], strict=True)]
    calls = [(store, run_id, shards, parts) for shards in ranges]
    entries: dict[int, FileEntry] = {}
    for _, built in run_tasks(client, _build_shards, calls):
        if isinstance(built, Killed):
            raise ExtractionError("building the shards brings the workers down: more shards need less memory each")
        if isinstance(built, KeyCollisionError | InvalidRowsError):
            raise built
        entries |= built
    return entries


def shard_task_bytes(client: Client) -> int:
    """Bytes of rows that one task may hold on the smallest worker, whose threads all have one."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    rooms: list[int] = [worker["memory_limit"] // worker["nthreads"] // SHARD_MEMORY_SHARE for worker in workers]
    return min([SHARD_TASK_BYTES, *(room for room in rooms if room)])  # 0: no limit


def _build_shards(
    store: FeatureStore, run_id: str, shards: range, parts: list[str]
) -> dict[int, FileEntry] | KeyCollisionError | InvalidRowsError:
    """A person's mistake as a result: Dask would log a raised one with its traceback, and try again."""
    try:
        return store.build_shards(run_id, shards, parts)
    except (KeyCollisionError, InvalidRowsError) as error:
        return error
