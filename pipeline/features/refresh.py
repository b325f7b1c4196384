"""The store brought up to date with its images: list, compare, compute what is new, remove what is gone, one commit.

A run that was killed goes on where it was when the same command runs again: its parts are staged in the store under a
run id made of the store, the images' address and the size of parts, and a part counts as long as its images are the
same.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import numpy as np
from distributed import Client

from featurestore.errors import SpecMismatchError, StoreNotFoundError
from featurestore.quarantine import QuarantineRow
from featurestore.snapshot import Snapshot
from featurestore.spec import NetworkName, StoreInfo
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from pipeline.cluster.checks import wait_for_workers
from pipeline.errors import ExtractionError
from pipeline.features.diff import (
    Comparison,
    Plan,
    compare,
    equal_candidates,
    find_digests,
    pending_images,
    run_id_of,
    split,
)
from pipeline.features.part import BadImage, PartReport, PartSettings
from pipeline.features.staged_run import Run, digest_all, workers_per_host
from pipeline.features.summary import RefreshSummary, describe_bad
from pipeline.images.source import ImageRef, Listing, list_images
from pipeline.network.backbone import ComputeDType
from pipeline.network.compute_dtype import describe_network
from pipeline.network.weights import check_weights_name

WORKERS_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class RefreshOptions:
    """What to refresh, and how. What is None is as the store has it."""

    images: str
    store: str
    weights: str | None = None
    compute_dtype: ComputeDType | None = None
    batch_size: int = 16
    part_size: int = 256
    backbone: str | None = None  # MODEL:LAYER
    keep_missing: bool = False
    max_gone: float = 0.5  # share of the store's rows that may vanish in one run
    dry_run: bool = False


class Outcome(NamedTuple):
    """What a run came to, before it is counted."""

    plan: Plan
    reports: list[PartReport]
    bad: tuple[BadImage, ...]
    num_resumed: int
    num_gone: int
    num_kept: int
    num_resolved: int


def refresh(options: RefreshOptions, client: Client) -> RefreshSummary:
    """Bring an existing store up to date with the images; at most one commit, and none when nothing has changed.

    Images whose bytes the store knows are copied, the others computed; keys that are not listed any more get
    tombstones. A changed image that cannot be decoded loses its feature, one that cannot be read keeps it; both stand
    in the quarantine, which is tried again by the next run. Raises StoreNotFoundError, SourceError, WeightsError,
    SpecMismatchError, ExtractionError, ClusterError and the errors of storage; what was staged by then stays for the
    next run, unless so much of it is bad that nothing is committed.
    """
    start_s = time.monotonic()
    try:
        store = FeatureStore.open(options.store)
    except StoreNotFoundError as error:
        raise StoreNotFoundError(f"{error}; jobs/extract_features.py makes one") from error
    options = _as_stored(options, store.info)
    listing = list_images(options.images)
    wait_for_workers(client, str(client.scheduler_info()["address"]), 1, WORKERS_TIMEOUT_S)
    return bring_up_to_date(options, client, store, listing, "refresh", start_s)


def bring_up_to_date(
    options: RefreshOptions, client: Client, store: FeatureStore, listing: Listing, operation: str, start_s: float
) -> RefreshSummary:
    """What `refresh` and `extract` share: all after the listing. `start_s` is of `time.monotonic`."""
    images, snapshot, quarantined = listing.images, store.snapshot(), store.quarantine_rows()
    comparison = compare(images, snapshot)
    gone = comparison.gone_keys[:0] if options.keep_missing else comparison.gone_keys
    _check_gone(options, len(gone), comparison.num_stored, f"are not in {options.images}")
    plan, digests = _make_plan(client, images, comparison, snapshot)
    settings = _settings(options, client, store)
    run = Run(client, store, settings, options.part_size, options.dry_run)
    reports = run.compute(plan.compute, digests, lambda: _check_network(client, store, settings))
    run.copy([*plan.touched, *plan.duplicates], snapshot.version)
    bad = tuple(sorted((image for report in reports for image in report.bad), key=lambda image: image.uri))
    lost = [image.key for image in bad if image.was_read and image.key in plan.stored_keys]
    removed = np.concatenate([gone, np.array(lost, np.int64)])
    run.remove(removed)
    settled, num_resolved = _settled(quarantined, images, bad, options.keep_missing)
    if not options.dry_run:
        _add_quarantine(store, bad, quarantined)
    try:
        if len(bad) == len(images) and not options.dry_run:
            raise ExtractionError(f"none of the {len(bad):,} images can be used: {describe_bad(bad)}")
        _check_gone(options, len(removed), comparison.num_stored, "are gone or cannot be decoded any more")
    except ExtractionError:
        run.discard()  # the next run looks at all files again: it may be the decoder that is broken
        raise
    if not options.dry_run:
        if run.has_rows:
            snapshot = store.commit(run.build_shards(), operation, num_quarantined=len(bad))
        run.discard()
        store.resolve_quarantine(settled)
    done = Outcome(plan, reports, bad, run.num_resumed, len(gone), len(comparison.gone_keys) - len(gone), num_resolved)
    return _summary(options, listing, done, store, snapshot, start_s)


def _summary(
    options: RefreshOptions, listing: Listing, done: Outcome, store: FeatureStore, snapshot: Snapshot, start_s: float
) -> RefreshSummary:
    num_changed = len(done.plan.stored_keys - {image.key for image in done.bad})
    num_pending = len(done.plan.compute) + len(done.plan.duplicates)
    return RefreshSummary(
        num_images=len(listing.images),
        num_ignored=listing.num_ignored,
        num_new=num_pending - len(done.bad) - num_changed,
        num_changed=num_changed,
        num_touched=len(done.plan.touched),
        num_unchanged=done.plan.num_unchanged,
        num_gone=done.num_gone,
        num_kept=done.num_kept,
        num_resolved=done.num_resolved,
        num_computed=sum(report.num_computed for report in done.reports),
        num_duplicates=sum(report.num_duplicates for report in done.reports) + len(done.plan.duplicates),
        num_resumed=done.num_resumed,
        bad=done.bad,
        seconds=time.monotonic() - start_s,
        store=store.url,
        snapshot=snapshot.version,
        is_dry=options.dry_run,
    )


def _make_plan(
    client: Client, images: Sequence[ImageRef], comparison: Comparison, snapshot: Snapshot
) -> tuple[Plan, dict[int, bytes]]:
    """The plan, and the digests that it took. An image beside an empty store is read for it only if it may have an
    equal in the listing; else each that is new, or may have changed, is."""
    pending = pending_images(images, comparison)
    digests = digest_all(client, pending if comparison.num_stored else equal_candidates(pending))
    stored = find_digests(snapshot, digests.values()) if comparison.num_stored else {}
    return split(images, comparison, digests, stored), digests


def _as_stored(options: RefreshOptions, info: StoreInfo) -> RefreshOptions:
    """The options, with what they leave open as the store has it. Raises WeightsError, SpecMismatchError."""
    model = info.extractor.backbone.removeprefix("torchvision ")
    network = info.network or NetworkName(backbone=f"{model}:{info.extractor.layer}", weights="imagenet")
    stored_dtype = info.extractor.compute_dtype
    if options.compute_dtype not in (None, stored_dtype):
        raise SpecMismatchError(
            f"compute_dtype={options.compute_dtype}, and the features at {options.store} were computed in"
            f" {stored_dtype}: leave the option away, or use another store"
        )
    return replace(
        options,
        backbone=options.backbone or network.backbone,
        weights=check_weights_name(options.weights or network.weights),
        compute_dtype=cast("ComputeDType", stored_dtype),
    )


def _settings(options: RefreshOptions, client: Client, store: FeatureStore) -> PartSettings:
    assert options.backbone and options.weights and options.compute_dtype
    return PartSettings(
        store=store.url,
        run_id=run_id_of(store.info.digest, Storage(options.images).url, options.part_size),
        backbone=options.backbone,
        weights=options.weights,
        spec_digest=store.info.extractor.digest,
        compute_dtype=options.compute_dtype,
        dtype=store.info.dtype,
        batch_size=options.batch_size,
        workers_per_host=workers_per_host(client),
    )


def _check_network(client: Client, store: FeatureStore, settings: PartSettings) -> None:
    """Raise SpecMismatchError, naming what differs, unless the workers build the store's own network."""
    spec = describe_network(client, settings.backbone, settings.weights, settings.compute_dtype)
    store.info.model_copy(update={"extractor": spec}).check_same(store.info, f"the store at {store.url}")


def _check_gone(options: RefreshOptions, num_gone: int, num_stored: int, why: str) -> None:
    """Raise ExtractionError where more of the store would vanish than the options allow."""
    if num_gone > options.max_gone * num_stored:
        raise ExtractionError(
            f"{num_gone:,} of the {num_stored:,} images in {options.store} {why}, more than a share of"
            f" {options.max_gone:g}: is --images right? In jobs/refresh_features.py --keep-missing keeps"
            " them, --max-gone 1 lets them go"
        )


def _add_quarantine(store: FeatureStore, bad: Iterable[BadImage], quarantined: Iterable[QuarantineRow]) -> None:
    """Keep the bad images in the store's quarantine; those that stand there for the same reason stay as they are."""
    known = {(row.key, row.uri, row.reason) for row in quarantined}
    rows = [QuarantineRow(image.key, image.uri, image.reason, time.time()) for image in bad]
    store.add_quarantine([row for row in rows if (row.key, row.uri, row.reason) not in known])


def _settled(
    quarantined: Sequence[QuarantineRow], images: Sequence[ImageRef], bad: Iterable[BadImage], keep_missing: bool
) -> tuple[list[QuarantineRow], int]:
    """Rows that leave the quarantine: of images that are good now (how many), or that are not listed any more."""
    bad_keys = {image.key for image in bad}
    keys_Q = np.array([row.key for row in quarantined], np.int64)
    is_listed_Q = np.isin(keys_Q, np.fromiter((ref.key for ref in images), np.int64, len(images)))
    resolved = [row for row, here in zip(quarantined, is_listed_Q, strict=True) if here and row.key not in bad_keys]
    left = [row for row, here in zip(quarantined, is_listed_Q, strict=True) if not here and not keep_missing]
    return resolved + left, len(resolved)
