"""One extraction or refresh on its cluster: digests of files, and parts with computed and copied rows."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from distributed import Client

from featurestore.console.output import progress_bar
from featurestore.keys import Int64Array
from featurestore.snapshot import Snapshot
from featurestore.staging import QuarantineRow
from featurestore.store import FeatureStore
from pipeline.cluster.tasks import Killed, run_alone, run_tasks
from pipeline.errors import StoreRunError
from pipeline.features.copy_part import copy_part
from pipeline.features.diff import (
    DIGEST_DTYPE,
    BoolArray,
    DigestArray,
    ImageCopies,
    ImagePart,
    make_copy_parts,
    make_parts,
)
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
from pipeline.images.imagetable import ImageTable
from pipeline.store_run import TOMBSTONES, StoreRun

DIGESTS_PER_TASK = 1024
REPORT_THREADS = 8
COPIES = "copies"  # parts of this name have no report


def digest_all(client: Client, images: ImageTable, index_K: Int64Array) -> DigestArray:
    """Hash the bytes of the images at `index_K` by xxh3-128, (K,); empty where they cannot be read."""
    digest_K = np.zeros(len(index_K), DIGEST_DTYPE)
    starts = range(0, len(index_K), DIGESTS_PER_TASK)
    calls = ((images.refs(index_K[start : start + DIGESTS_PER_TASK]),) for start in starts)
    with progress_bar("comparing", len(index_K)) as bar:
        for place, found in run_tasks(client, digest_images, calls):
            chunk_K = digest_K[starts[place] : starts[place] + DIGESTS_PER_TASK]
            bar.advance(len(chunk_K))
            if not isinstance(found, Killed):  # then equal images are computed twice, and equally
                chunk_K[:] = found
    return digest_K


def workers_per_host(client: Client) -> dict[str, int]:
    """Count the workers that share each host's cores."""
    return dict(Counter(host_of(address) for address in client.scheduler_info(n_workers=-1)["workers"]))


class ImageRun(StoreRun):
    """A StoreRun of images. A dry one decodes them, so that the counts are right."""

    def __init__(
        self,
        client: Client,
        store: FeatureStore,
        settings: PartSettings,
        snapshot: Snapshot,
        quarantined: Sequence[QuarantineRow],
        part_size: int,
        is_dry: bool,
    ):
        super().__init__(client, store, settings.run_id, snapshot, quarantined, is_dry)
        self._settings = settings
        self._part_size = part_size
        self.num_resumed = 0  # images in parts that were staged before

    def compute(
        self, images: ImageTable, index_C: Int64Array, digest_C: DigestArray, before: Callable[[], None]
    ) -> list[PartReport]:
        """Stage parts with all images at `index_C` and return their reports; `before` is called if any is left to do.

        The refs of a part are made when it is submitted, so that a few parts at a time take memory.
        """
        reports, is_left_C = self._taken_over(images, index_C)
        num_covered = len(index_C) - int(np.count_nonzero(is_left_C))
        self.num_resumed += num_covered
        waiting = make_parts(images, index_C[is_left_C], digest_C[is_left_C], self._part_size)
        if waiting and not self.is_dry:
            before()
        work = check_part if self.is_dry else extract_part
        suspects = []
        with progress_bar("decoding" if self.is_dry else "extracting", len(index_C), num_covered) as bar:
            calls = ((self._settings, part.name, images.refs(part.index_K)) for part in waiting)
            for place, report in run_tasks(self.client, work, calls):
                if isinstance(report, Killed):
                    suspects.append(waiting[place])
                    continue
                reports.append(report)
                bar.advance(len(waiting[place].index_K))
            for part in suspects:
                reports.append(self._compute_suspect(work, images, part))
                bar.advance(len(part.index_K))
        self.parts += [part.name for part in waiting]
        self.num_rows += sum(report.num_rows for report in reports)
        return reports

    def copy(self, images: ImageTable, copies: ImageCopies) -> None:
        """Stage rows of images whose bytes the snapshot has."""
        parts = make_copy_parts(images, copies, self._part_size, COPIES)
        self.parts += [part.name for part in parts]
        self.num_rows += len(copies.index_K)
        if self.is_dry:
            return
        waiting = [part for part in parts if part.name not in self.staged]
        calls = (
            (self.store, self.run_id, part.name, self.snapshot.version, part.copies.of(images)) for part in waiting
        )
        with progress_bar("copying", sum(len(part.copies.index_K) for part in waiting)) as bar:
            for place, done in run_tasks(self.client, copy_part, calls):
                if isinstance(done, Killed):
                    raise StoreRunError("copying rows brings the workers down: try a smaller --part-size")
                bar.advance(len(waiting[place].copies.index_K))

    def _taken_over(self, images: ImageTable, index_C: Int64Array) -> tuple[list[PartReport], BoolArray]:
        """Load the reports of staged parts whose images are all at `index_C`, unchanged; return also which are in none.

        So the parts outlive a listing that has changed since, but for those with an image that did. Images that could
        not be read are left to do, as that may have been for a moment: the reports are without them.
        """
        names = [name for name in sorted(self.staged) if not name.startswith((COPIES, TOMBSTONES))]
        reports = list[PartReport]()
        if not names:
            return reports, np.ones(len(index_C), np.bool_)
        unclaimed = _Unclaimed(images, index_C)
        loaded = in_order(self._load_report, names, REPORT_THREADS, 2 * REPORT_THREADS)
        for name, report in zip(names, loaded, strict=True):
            if report is None:
                continue
            if not report.images:
                if not self.is_dry:  # a new part may have its name, and writes its report before its rows
                    self.store.discard_part(self.run_id, name)
            elif unclaimed.claim(report.images):
                reports.append(replace(report, images=()))
                self.parts.append(name)
        return reports, unclaimed.is_left_C

    def _load_report(self, part: str) -> PartReport | None:
        try:
            return without_unread(PartReport.load(self.store.url, self.run_id, part))
        except FileNotFoundError:  # expiry removes what was staged long ago
            return None

    def _compute_suspect(self, work: Callable[..., PartReport], images: ImageTable, part: ImagePart) -> PartReport:
        """Compute a part during which workers died, alone, without images that bring a worker down by themselves."""
        refs = images.refs(part.index_K)
        tried = {ref.key: run_alone(self.client, try_image, self._settings, ref) for ref in refs}
        deadly = {key for key, result in tried.items() if isinstance(result, Killed)}
        report: PartReport | Killed = run_alone(self.client, work, self._settings, part.name, refs, 1, deadly)
        if isinstance(report, Killed):
            raise StoreRunError(
                f"workers die while they compute {refs[0].uri} and {len(refs) - 1} more images, though each"
                " can be decoded: give workers more memory, or set a smaller --batch-size"
            )
        return report


class _Unclaimed:
    """Images to compute that no staged part has, (C,): `is_left_C`."""

    def __init__(self, images: ImageTable, index_C: Int64Array) -> None:
        self._images, self._index_C = images, index_C
        keys_C = images.keys()[index_C]
        self._order_C = np.argsort(keys_C)
        self._sorted_C = keys_C[self._order_C]
        self.is_left_C = np.ones(len(index_C), np.bool_)

    def claim(self, part: Sequence[tuple[int, str]]) -> bool:
        """Take the images of a part, by key and source tag, if all of them are left; return whether they were."""
        keys_K = np.array([key for key, _ in part], np.int64)
        place_K = np.searchsorted(self._sorted_C, keys_K)
        is_here = place_K.max() < len(self._sorted_C) and np.array_equal(self._sorted_C[place_K], keys_K)
        if not is_here or not self.is_left_C[self._order_C[place_K]].all():
            return False
        place_K = self._order_C[place_K]
        tags = self._images.take(self._index_C[place_K], "source_tag")["source_tag"]
        if tags.to_pylist() != [tag for _, tag in part]:
            return False
        self.is_left_C[place_K] = False
        return True
