"""One extraction or refresh on its cluster: digests of files, and parts with computed and copied rows."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from distributed import Client

from featurestore.console.progress import progress_bar
from featurestore.quarantine import QuarantineRow
from featurestore.snapshot import Snapshot
from featurestore.store import FeatureStore
from pipeline.cluster.tasks import Killed, run_alone, run_tasks
from pipeline.errors import StoreRunError
from pipeline.features.copy_part import copy_part
from pipeline.features.diff import ImageCopy, ImagePart, make_copy_parts, make_parts
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
from pipeline.store_run import TOMBSTONES, StoreRun

DIGESTS_PER_TASK = 1024
REPORT_THREADS = 8
COPIES = "copies"  # parts of this name have no report


def digest_all(client: Client, refs: Sequence[ImageRef]) -> dict[int, bytes]:
    """Hash the bytes of each image by xxh3-128, by key; empty or missing where it cannot be read."""
    chunks = [refs[i : i + DIGESTS_PER_TASK] for i in range(0, len(refs), DIGESTS_PER_TASK)]
    digests: dict[int, bytes] = {}
    with progress_bar("comparing", len(refs)) as bar:
        for index, found in run_tasks(client, digest_images, [(chunk,) for chunk in chunks]):
            bar.advance(len(chunks[index]))
            if not isinstance(found, Killed):  # then equal images are computed twice, and equally
                digests |= {ref.key: digest for ref, digest in zip(chunks[index], found, strict=True)}
    return digests


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
        self, refs: Sequence[ImageRef], digests: Mapping[int, bytes], before: Callable[[], None]
    ) -> list[PartReport]:
        """Stage parts with all `refs` and return their reports; `before` is called if anything is left to do."""
        reports, covered = self._taken_over(refs)
        self.num_resumed += len(covered)
        waiting = make_parts(
            [ref for ref in refs if ref.key not in covered], lambda ref: digests.get(ref.key, b""), self._part_size
        )
        if waiting and not self.is_dry:
            before()
        work = check_part if self.is_dry else extract_part
        suspects = []
        with progress_bar("decoding" if self.is_dry else "extracting", len(refs), len(covered)) as bar:
            calls = [(self._settings, part.name, part.refs) for part in waiting]
            for index, report in run_tasks(self.client, work, calls):
                if isinstance(report, Killed):
                    suspects.append(waiting[index])
                    continue
                reports.append(report)
                bar.advance(len(waiting[index].refs))
            for part in suspects:
                reports.append(self._compute_suspect(work, part))
                bar.advance(len(part.refs))
        self.parts += [part.name for part in waiting]
        self.num_rows += sum(report.num_rows for report in reports)
        return reports

    def copy(self, copies: Iterable[ImageCopy]) -> None:
        """Stage rows of images whose bytes the snapshot has."""
        parts = make_copy_parts(copies, self._part_size, COPIES)
        self.parts += [part.name for part in parts]
        self.num_rows += sum(len(part.copies) for part in parts)
        if self.is_dry:
            return
        waiting = [part for part in parts if part.name not in self.staged]
        calls = [(self.store, self.run_id, part.name, self.snapshot.version, part.copies) for part in waiting]
        with progress_bar("copying", sum(len(part.copies) for part in waiting)) as bar:
            for index, done in run_tasks(self.client, copy_part, calls):
                if isinstance(done, Killed):
                    raise StoreRunError("copying rows brings the workers down: try a smaller --part-size")
                bar.advance(len(waiting[index].copies))

    def _taken_over(self, refs: Iterable[ImageRef]) -> tuple[list[PartReport], set[int]]:
        """Load the reports of staged parts whose images are all among `refs`, unchanged; and these images' keys.

        So the parts outlive a listing that has changed since, but for those with an image that did. Images that could
        not be read are left to do, as that may have been for a moment: the reports are without them.
        """
        names = [name for name in sorted(self.staged) if not name.startswith((COPIES, TOMBSTONES))]
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
                if not self.is_dry:  # a new part may have its name, and writes its report before its rows
                    self.store.discard_part(self.run_id, name)
            elif left.issuperset(report.images):
                left.difference_update(report.images)
                covered.update(key for key, _ in report.images)
                reports.append(report)
                self.parts.append(name)
        return reports, covered

    def _load_report(self, part: str) -> PartReport | None:
        try:
            return without_unread(PartReport.load(self.store.url, self.run_id, part))
        except FileNotFoundError:  # expiry removes what was staged long ago
            return None

    def _compute_suspect(self, work: Callable[..., PartReport], part: ImagePart) -> PartReport:
        """Compute a part during which workers died, alone, without images that bring a worker down by themselves."""
        tried = {ref.key: run_alone(self.client, try_image, self._settings, ref) for ref in part.refs}
        deadly = {key for key, result in tried.items() if isinstance(result, Killed)}
        report: PartReport | Killed = run_alone(self.client, work, self._settings, part.name, part.refs, 1, deadly)
        if isinstance(report, Killed):
            raise StoreRunError(
                f"workers die while they compute {part.refs[0].uri} and {len(part.refs) - 1} more images, though each"
                " can be decoded: give workers more memory, or set a smaller --batch-size"
            )
        return report
