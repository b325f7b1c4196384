"""Extraction and refresh: plan, run on a cluster, and commit.

A killed run continues when the same command runs again: its parts are staged in the store under a run id made of the
store, the images' address and the size of parts, and a part counts as long as its images are the same.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from distributed import Client

from featurestore.console.output import print_warning, progress_bar
from featurestore.errors import SpecMismatchError, StoreNotFoundError
from featurestore.keys import Int64Array, splitmix64
from featurestore.lookup import AutoDType, dtype_of_environment, dtype_of_machine
from featurestore.published.versions import check_channel_name
from featurestore.spec import ExtractorSpec, Int8Spec, NetworkName, StoreInfo
from featurestore.storage.storage import Storage, in_threads
from featurestore.store import FeatureStore, Snapshot
from featurestore.upkeep.history import move_channel
from pipeline import store_run
from pipeline.cluster.tasks import Killed, run_all, run_alone, run_tasks
from pipeline.errors import BackboneError, StoreRunError
from pipeline.features import diff
from pipeline.features import part as parts
from pipeline.images.source import ImageTable, Listing, list_images
from pipeline.network import Precision, check_weights_name
from pipeline.options import ExtractOptions, RefreshOptions
from pipeline.problems import Problem

CALIBRATION_IMAGES = 96  # for int8: two thirds to measure ranges, the others to compare it with float32


@dataclass(frozen=True, kw_only=True)
class RefreshSummary:
    """Counts of one run. Each image of the listing is one of new, changed, touched, unchanged and bad."""

    num_images: int  # listed
    num_ignored: int  # files that are not images by their extension, or repeated rows of a table
    num_new: int  # the store did not have them
    num_changed: int  # the store had other bytes
    num_touched: int  # the store has these bytes under another tag; the feature stays
    num_unchanged: int
    num_gone: int  # rows removed because their image is not listed any more
    num_kept: int  # rows that stay though their image is not listed
    num_resolved: int  # were in quarantine and are good now
    num_computed: int  # new and changed images through the network, earlier, killed runs' included
    num_duplicates: int  # new and changed images whose feature is that of an image of equal bytes
    num_resumed: int  # staged by an earlier, killed run
    bad: tuple[store_run.BadRow, ...]  # in quarantine after the run, of the images listed
    seconds: float
    store: str
    snapshot: int  # version after the run
    precision: str  # in which the store's network multiplies
    channel: str | None = None  # points to it from now on

    def __str__(self) -> str:
        """Return the lines that a job prints."""
        kept = f" ({self.num_kept:,} not listed, kept)" if self.num_kept else ""
        num_worked_on = max(0, self.num_images - self.num_unchanged - self.num_touched - self.num_resumed)
        speed = f", {num_worked_on / max(self.seconds, 1e-9):.1f} images/s" if num_worked_on else ""
        lines = [
            f"images       {self.num_images:,} ({self.num_ignored:,} other files ignored)",
            f"new          {self.num_new:,}",
            f"changed      {self.num_changed:,}",
            f"touched      {self.num_touched:,} (other date or tag, same bytes)",
            f"unchanged    {self.num_unchanged:,}",
            f"gone         {self.num_gone:,}{kept}",
            f"quarantined  {len(self.bad):,}{': ' + store_run.describe_bad(self.bad) if self.bad else ''}",
            f"resolved     {self.num_resolved:,} (were in quarantine)",
            f"duplicates   {self.num_duplicates:,} (feature copied from equal bytes)",
            f"computed     {self.num_computed:,} ({self.num_resumed:,} images staged by an earlier run)",
            f"precision    {self.precision}",
            f"time         {self.seconds:.1f} s{speed}",
            f"store        {self.store}, snapshot {self.snapshot}",
        ]
        if self.channel:
            lines.append(f"channel      {self.channel} points to snapshot {self.snapshot}")
        return "\n".join(lines)


def refresh(options: RefreshOptions, client: Client) -> RefreshSummary:
    """Bring an existing store up to date with the images; at most one commit, and none when nothing has changed.

    Images whose bytes the store knows are copied, the others computed; keys that are not listed any more get
    tombstones. A changed image that cannot be decoded loses its feature, one that cannot be read keeps it; both are
    in the quarantine, which is tried again by the next run. Raises StoreNotFoundError, SourceError, WeightsError,
    SpecMismatchError, StoreRunError, ClusterError and the errors of storage; what was staged by then stays for the
    next run, unless so much of it is bad that nothing is committed. The channel of the options, if there is one, then
    points to the newest snapshot, also where nothing has changed.
    """
    start_s = time.monotonic()
    if options.channel is not None:
        check_channel_name(options.channel)
    try:
        store = FeatureStore.open(options.store)
    except StoreNotFoundError as error:
        raise StoreNotFoundError(Problem.NO_STORE_YET, options.store) from error
    options = replace(options, weights=check_weights_name(options.weights or _network_of(store.info).weights))
    listing = list_images(options.images)
    store_run.wait_for_worker(client)
    return bring_up_to_date(options, client, store, listing, "refresh", start_s)


def bring_up_to_date(
    options: RefreshOptions, client: Client, store: FeatureStore, listing: Listing, operation: str, start_s: float
) -> RefreshSummary:
    """Do all that follows the listing, for `refresh` and `extract`. `start_s` is of `time.monotonic`."""
    images, snapshot = listing.images, store.snapshot()
    comparison = diff.compare(images, snapshot)
    gone = comparison.gone_keys[:0] if options.keep_missing else comparison.gone_keys
    _check_gone(options, len(gone), comparison.num_stored, Problem.TOO_MANY_UNLISTED, options.images)
    plan = make_plan(client, images, comparison, snapshot)
    settings = _settings(options, client, store, snapshot)
    run = ImageRun(client, store, settings, snapshot)
    reports = run.stage(images, plan)
    bad = tuple(sorted((image for report in reports for image in report.bad), key=lambda image: image.uri))
    unusable = np.array([image.key for image in bad if image.was_read], np.int64)
    removed = np.concatenate([gone, unusable[np.isin(unusable, plan.stored_keys)]])
    run.remove(removed)
    run.quarantine(bad)
    try:
        if len(bad) == len(images):
            raise StoreRunError(Problem.NO_USABLE_IMAGE, len(bad), store_run.describe_bad(bad))
        _check_gone(options, len(removed), comparison.num_stored, Problem.TOO_MANY_GONE)
    except StoreRunError:
        store.discard_staging(run.run_id)  # the next run looks at all files again: it may be the decoder that is broken
        raise
    keys_N = images.keys()
    resolved = run.recovered(keys_N, bad)
    is_listed = np.isin(np.array([row.key for row in run.quarantined], np.int64), keys_N)
    rows = zip(run.quarantined, is_listed, strict=True)
    unlisted = [row for row, is_here in rows if not is_here and not options.keep_missing]
    version = run.commit(operation, len(bad), [*resolved, *unlisted])
    if options.channel is not None:
        move_channel(store, options.channel, version, operation)
    return _summarise(
        plan,
        reports,
        bad,
        num_images=len(images),
        num_ignored=listing.num_ignored,
        num_gone=len(gone),
        num_kept=len(comparison.gone_keys) - len(gone),
        num_resolved=len(resolved),
        num_resumed=run.num_resumed,
        seconds=time.monotonic() - start_s,
        store=store.url,
        snapshot=version,
        precision=str(store.info.extractor.precision),
        channel=options.channel,
    )


def _summarise(
    plan: diff.ListingPlan, reports: Sequence[parts.PartReport], bad: tuple[store_run.BadRow, ...], **counts: Any
) -> RefreshSummary:
    bad_keys = np.array([image.key for image in bad], np.int64)
    num_changed = int(np.count_nonzero(~np.isin(plan.stored_keys, bad_keys)))
    num_duplicates = len(plan.copies.index_K) - plan.num_touched
    return RefreshSummary(
        num_new=len(plan.compute_C) + num_duplicates - len(bad) - num_changed,
        num_changed=num_changed,
        num_touched=plan.num_touched,
        num_unchanged=plan.num_unchanged,
        num_computed=sum(report.num_computed for report in reports),
        num_duplicates=sum(report.num_duplicates for report in reports) + num_duplicates,
        bad=bad,
        **counts,
    )


def make_plan(client: Client, images: ImageTable, comparison: diff.Comparison, snapshot: Snapshot) -> diff.ListingPlan:
    """Plan the run.

    In an empty store an image is read for its digest only if it may have an equal in the listing; else each that is
    new, or may have changed, is."""
    # What the store lacks, or whose file may have changed since: another tag, or none.
    pending_P = np.flatnonzero(~(comparison.is_same_tag_N & images.has_tag()))
    asked = slice(None) if comparison.num_stored else diff.equal_candidates(images.sizes()[pending_P])
    digest_P = np.zeros(len(pending_P), diff.DIGEST_DTYPE)
    digest_P[asked] = digest_all(client, images, pending_P[asked])
    return diff.split(images, comparison, pending_P, digest_P, *diff.find_digests(snapshot, digest_P))


def _network_of(info: StoreInfo) -> NetworkName:
    """Name the network of a store."""
    model = info.extractor.backbone.removeprefix("torchvision ")
    return info.network or NetworkName(backbone=f"{model}:{info.extractor.layer}", weights="imagenet")


def _settings(options: RefreshOptions, client: Client, store: FeatureStore, snapshot: Snapshot) -> parts.PartSettings:
    assert options.weights
    return parts.PartSettings(
        store=store.url,
        run_id=store_run.run_id_of(store.info.digest, Storage(options.images).url, options.part_size),
        backbone=_network_of(store.info).backbone,
        weights=options.weights,
        extractor=store.info.extractor,
        version=snapshot.version,
        batch_size=options.batch_size,
        part_size=options.part_size,
        workers_per_host=workers_per_host(client),
    )


def describe_network(client: Client, backbone_name: str, weights: str, precision: Precision) -> ExtractorSpec:
    """Return the spec of the network as a worker builds it, which keeps it; this process does without torch.

    `auto` is what our environment names, else bfloat16 where the hardware of all workers is quick at it, else float32.
    Raises BackboneError, WeightsError; ClusterError where the workers die of it.
    """
    if precision == "auto":
        precision = _settled_dtype(client)
    call, advice = (backbone_name, weights, precision), "give each worker 1 GB more"
    spec: ExtractorSpec = run_all(client, "building the network", _spec_of, [call], advice)[0]
    return spec


def _settled_dtype(client: Client) -> AutoDType:
    try:
        named = dtype_of_environment()
    except ValueError as failure:
        raise BackboneError(str(failure)) from failure
    if named:
        return named
    return "bfloat16" if set(client.run(dtype_of_machine).values()) == {"bfloat16"} else "float32"


def _spec_of(backbone_name: str, weights: str, precision: Precision) -> ExtractorSpec:
    from pipeline.network.backbone import backbone

    return backbone(backbone_name, weights, precision).spec


def _check_gone(options: RefreshOptions, num_gone: int, num_stored: int, problem: Problem, *about: str) -> None:
    """Raise StoreRunError of `problem`, with `about` in it, where more than a share of the rows would vanish."""
    if num_gone > options.max_gone * num_stored:
        raise StoreRunError(problem, num_gone, num_stored, options.store, *about, options.max_gone)


def extract(options: ExtractOptions, client: Client) -> RefreshSummary:
    """Do as `pipeline.features.refresh.refresh`, but make a new store, and keep the rows of other images.

    Raises SourceError, BackboneError, WeightsError, SpecMismatchError, StoreRunError, ClusterError and the errors of
    storage; what was staged by then stays for the next run. A compact store keeps its basis. Prints a warning of random
    weights.
    """
    from pipeline.network.backbone import feature_dim  # loads Torch, which a refresh does not need

    start_s = time.monotonic()
    if options.channel is not None:
        check_channel_name(options.channel)
    weights = check_weights_name(options.weights)
    if weights.startswith("random:"):
        print_warning(f"the weights {weights} are NOT pretrained")
    listing = list_images(options.images)
    store_run.wait_for_worker(client)
    known = store_run.find_store(options.store)
    precision = _precision_for(options, client, weights, listing.images, known)
    spec = describe_network(client, options.backbone, weights, precision)
    asked = {
        "num_shards": options.num_shards,
        "name": options.name,
        "dtype": options.dtype,
        "dim": feature_dim(options.backbone, weights),
        "extractor": spec,
    }
    network = NetworkName(backbone=options.backbone, weights=weights)
    store = store_run.open_or_make(options.store, asked, network=network)
    refreshed = RefreshOptions(
        images=options.images,
        store=options.store,
        weights=weights,
        batch_size=options.batch_size,
        part_size=options.part_size,
        keep_missing=True,
        channel=options.channel,
    )
    return bring_up_to_date(refreshed, client, store, listing, "extract", start_s)


def _precision_for(
    options: ExtractOptions, client: Client, weights: str, images: ImageTable, known: FeatureStore | None
) -> Precision:
    """Return the precision of a `known` store, else that of the options; for a new store in int8, calibrate it.

    That takes the images of the smallest hashes, so the same ones when it is done again. Raises SpecMismatchError for
    another precision than the store's; BackboneError where int8 keeps too little of the features; ClusterError.
    """
    if known is not None:
        extractor = known.info.extractor
        if options.precision not in ("auto", extractor.compute_dtype):
            raise SpecMismatchError(Problem.OTHER_PRECISION, options.precision, known.url, extractor.compute_dtype)
        return extractor.precision
    if options.precision != "int8":
        return options.precision
    refs = images.refs(np.argsort(splitmix64(images.keys()))[:CALIBRATION_IMAGES])
    call, advice = (options.backbone, weights, refs), "give each worker more, or take another --precision"
    int8: Int8Spec = run_all(client, "calibrating int8", parts.calibrate, [call], advice)[0]
    if not int8.mean_cosine >= options.least_cosine:
        raise BackboneError(Problem.INT8_TOO_COARSE, options.backbone, int8.mean_cosine, options.least_cosine)
    return int8


DIGESTS_PER_TASK = 1024
REPORT_THREADS = 8


def digest_all(client: Client, images: ImageTable, index_K: Int64Array) -> diff.DigestArray:
    """Hash the bytes of the images at `index_K` by xxh3-128, (K,); empty where they cannot be read."""
    digest_K = np.zeros(len(index_K), diff.DIGEST_DTYPE)
    starts = range(0, len(index_K), DIGESTS_PER_TASK)
    calls = ((images.refs(index_K[start : start + DIGESTS_PER_TASK]),) for start in starts)
    with progress_bar("comparing", len(index_K)) as bar:
        for place, found in run_tasks(client, parts.digest_images, calls):
            chunk_K = digest_K[starts[place] : starts[place] + DIGESTS_PER_TASK]
            bar.advance(len(chunk_K))
            if not isinstance(found, Killed):  # then equal images are computed twice, and equally
                chunk_K[:] = found
    return digest_K


def workers_per_host(client: Client) -> int:
    """Count the workers that share a host's cores, of the host that has most of them."""
    hosts = Counter(address.rpartition(":")[0] for address in client.scheduler_info(n_workers=-1)["workers"])
    return max(hosts.values(), default=1)


class ImageRun(store_run.StoreRun):
    """A StoreRun of images."""

    def __init__(self, client: Client, store: FeatureStore, settings: parts.PartSettings, snapshot: Snapshot) -> None:
        super().__init__(client, store, settings.run_id, snapshot)
        self._settings = settings
        self.num_resumed = 0  # images to compute in parts that were staged before

    def stage(self, images: ImageTable, plan: diff.ListingPlan) -> list[parts.PartReport]:
        """Stage parts with all images to compute and to copy; return their reports.

        The refs of a part are made when it is submitted, so that a few parts at a time take memory. Raises
        SpecMismatchError where the workers do not build the store's own network: looked at if any image is left to
        compute, or if the weights have another name than the store's.
        """
        computed = diff.make_parts(images, plan.compute_C, plan.digest_C, self._settings.part_size)
        everything = [*computed, *diff.make_copy_parts(images, plan.copies, self._settings.part_size)]
        reports = self._staged_reports(everything)
        self.num_resumed = sum(len(part.index_K) for part in computed if part.name in reports)
        waiting = [part for part in everything if part.name not in reports]
        settings, info = self._settings, self.store.info
        if settings.weights != _network_of(info).weights or any(part.source_key_K is None for part in waiting):
            spec = describe_network(self.client, settings.backbone, settings.weights, settings.extractor.precision)
            info.model_copy(update={"extractor": spec}).check_same(info, f"the store at {self.store.url}")
        total = sum(len(part.index_K) for part in everything)
        suspects = []
        with progress_bar("extracting", total, total - sum(len(part.index_K) for part in waiting)) as bar:
            calls = (self._call(images, part) for part in waiting)
            for place, report in run_tasks(self.client, parts.stage_part, calls):
                if isinstance(report, Killed):
                    suspects.append(waiting[place])
                    continue
                reports[waiting[place].name] = report
                bar.advance(len(waiting[place].index_K))
            for part in suspects:
                reports[part.name] = self._stage_suspect(images, part)
                bar.advance(len(part.index_K))
        self.parts += reports
        self.num_rows += sum(report.num_rows for report in reports.values())
        return list(reports.values())

    def _call(self, images: ImageTable, part: diff.ImagePart) -> tuple[Any, ...]:
        source_keys = None if part.source_key_K is None else part.source_key_K.tolist()
        return self._settings, part.name, images.refs(part.index_K), source_keys

    def _staged_reports(self, everything: Sequence[diff.ImagePart]) -> dict[str, parts.PartReport]:
        """Load the reports of the parts that an earlier run staged."""
        names = [part.name for part in everything if part.name in self.staged]
        loaded = in_threads(self._load_report, names, REPORT_THREADS)
        return {name: report for name, report in zip(names, loaded, strict=True) if report is not None}

    def _load_report(self, part: str) -> parts.PartReport | None:
        with contextlib.suppress(FileNotFoundError):  # expiry removes what was staged long ago
            return parts.PartReport.load(self.store, self.run_id, part)
        return None

    def _stage_suspect(self, images: ImageTable, part: diff.ImagePart) -> parts.PartReport:
        """Stage a part during which workers died, alone, without images that bring a worker down by themselves."""
        call = self._call(images, part)
        refs = call[2] if part.source_key_K is None else []
        tried = {ref.key: run_alone(self.client, parts.try_image, self._settings, ref) for ref in refs}
        deadly = {key for key, result in tried.items() if isinstance(result, Killed)}
        report: parts.PartReport | Killed = run_alone(self.client, parts.stage_part, *call, 1, deadly)
        if isinstance(report, Killed):
            raise StoreRunError(Problem.WORKERS_DIE, call[2][0].uri, len(call[2]) - 1)
        return report
