"""A refresh of a store by its images: list, compare, compute what is new, remove what is gone, one commit.

A killed run continues when the same command runs again: its parts are staged in the store under a run id made of the
store, the images' address and the size of parts, and a part counts as long as its images are the same.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from distributed import Client

from featurestore.errors import SpecMismatchError, StoreNotFoundError
from featurestore.lookup.compute_dtype import AutoDType
from featurestore.published.channels import check_channel_name
from featurestore.snapshot import Snapshot
from featurestore.spec import NetworkName, StoreInfo
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from featurestore.upkeep.history import ExtractionCost, keep_cost, move_channel
from pipeline.cluster.tasks import num_threads
from pipeline.errors import StoreRunError
from pipeline.features.diff import (
    DIGEST_DTYPE,
    Comparison,
    ListingPlan,
    compare,
    equal_candidates,
    find_digests,
    pending_images,
    split,
)
from pipeline.features.part import PartReport, PartSettings
from pipeline.features.staged_run import ImageRun, digest_all, workers_per_host
from pipeline.images.imagetable import ImageTable, Listing
from pipeline.images.source import list_images
from pipeline.network.described import check_weights_name, describe_network
from pipeline.options import RefreshOptions
from pipeline.store_run import BadRow, check_gone, describe_bad, run_id_of, wait_for_worker


@dataclass(frozen=True, kw_only=True)
class RefreshSummary:
    """Counts of one run. Each image of the listing is one of new, changed, touched, unchanged and bad.

    With `is_dry` they are what the run would have done.
    """

    num_images: int  # listed
    num_ignored: int  # files that are no images by their extension, or repeated rows of a table
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
    bad: tuple[BadRow, ...]  # in quarantine after the run, of the images listed
    seconds: float
    store: str
    snapshot: int  # version after the run
    channel: str | None = None  # points to it from now on
    is_dry: bool = False

    @property
    def images_per_s(self) -> float:
        """New, changed and bad images a second that this run itself worked on."""
        return max(0, self.num_images - self.num_unchanged - self.num_touched - self.num_resumed) / max(
            self.seconds, 1e-9
        )

    @property
    def counts(self) -> dict[str, float]:
        """Return what became of the images, to be drawn."""
        return {
            "new": self.num_new,
            "changed": self.num_changed,
            "touched": self.num_touched,
            "unchanged": self.num_unchanged,
            "gone": self.num_gone,
            "quarantined": len(self.bad),
            "duplicates": self.num_duplicates,
        }

    def __str__(self) -> str:
        """Give the lines that a job prints."""
        kept = f" ({self.num_kept:,} not listed, kept)" if self.num_kept else ""
        lines = [
            f"images       {self.num_images:,} ({self.num_ignored:,} other files ignored)",
            f"new          {self.num_new:,}",
            f"changed      {self.num_changed:,}",
            f"touched      {self.num_touched:,} (other date or tag, same bytes)",
            f"unchanged    {self.num_unchanged:,}",
            f"gone         {self.num_gone:,}{kept}",
            f"quarantined  {len(self.bad):,}{': ' + describe_bad(self.bad) if self.bad else ''}",
            f"resolved     {self.num_resolved:,} (were in quarantine)",
            f"duplicates   {self.num_duplicates:,} (feature copied from equal bytes)",
            f"computed     {self.num_computed:,} ({self.num_resumed:,} images staged by an earlier run)",
            f"time         {self.seconds:.1f} s, {self.images_per_s:.1f} images/s",
            f"store        {self.store}, snapshot {self.snapshot}",
        ]
        if self.channel and not self.is_dry:
            lines.append(f"channel      {self.channel} points to snapshot {self.snapshot}")
        if self.is_dry:
            lines.append("dry run      nothing was written")
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
    check_channel(options.channel)
    try:
        store = FeatureStore.open(options.store)
    except StoreNotFoundError as error:
        raise StoreNotFoundError(f"{error}; jobs/extract_features.py makes one") from error
    options = _as_stored(options, store.info)
    listing = list_images(options.images)
    wait_for_worker(client)
    return bring_up_to_date(options, client, store, listing, "refresh", start_s)


def check_channel(name: str | None) -> None:
    """Raise ChannelError, before anything is read or computed, where no channel may have this name."""
    if name is not None:
        check_channel_name(name)


def bring_up_to_date(
    options: RefreshOptions, client: Client, store: FeatureStore, listing: Listing, operation: str, start_s: float
) -> RefreshSummary:
    """Do all that follows the listing, for `refresh` and `extract`. `start_s` is of `time.monotonic`."""
    images, snapshot, quarantined = listing.images, store.snapshot(), store.quarantine_rows()
    comparison = compare(images, snapshot)
    gone = comparison.gone_keys[:0] if options.keep_missing else comparison.gone_keys
    _check_gone(options, len(gone), comparison, f"are not in {options.images}")
    plan = make_plan(client, images, comparison, snapshot)
    settings = _settings(options, client, store)
    run = ImageRun(client, store, settings, snapshot, quarantined, options.part_size, options.dry_run)
    reports = run.compute(images, plan.compute_C, plan.digest_C, lambda: _check_network(client, store, settings))
    run.copy(images, plan.copies)
    bad = tuple(sorted((image for report in reports for image in report.bad), key=lambda image: image.uri))
    unusable = np.array([image.key for image in bad if image.was_read], np.int64)
    removed = np.concatenate([gone, unusable[np.isin(unusable, plan.stored_keys)]])
    run.remove(removed)
    run.quarantine(bad)
    try:
        if len(bad) == len(images) and not options.dry_run:
            raise StoreRunError(f"none of the {len(bad):,} images can be used: {describe_bad(bad)}")
        _check_gone(options, len(removed), comparison, "are gone or cannot be decoded any more")
    except StoreRunError:
        run.discard()  # the next run looks at all files again: it may be the decoder that is broken
        raise
    keys_N = images.keys()
    resolved = run.good_again(keys_N, bad)
    is_listed = np.isin(np.array([row.key for row in quarantined], np.int64), keys_N)
    rows = zip(quarantined, is_listed, strict=True)
    unlisted = [row for row, is_here in rows if not is_here and not options.keep_missing]
    version = run.commit(operation, len(bad), [*resolved, *unlisted])
    if options.channel is not None and not options.dry_run:
        move_channel(store, options.channel, version, operation)
    summary = _summarise(
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
        channel=options.channel,
        is_dry=options.dry_run,
    )
    own = summary.num_computed - summary.num_resumed
    if own > 0 and version and not options.dry_run:
        cost = ExtractionCost(
            version=version,
            operation=operation,
            num_computed=own,
            seconds=summary.seconds,
            num_workers=num_threads(client),
        )
        keep_cost(store.storage, cost)
    return summary


def _summarise(
    plan: ListingPlan, reports: Sequence[PartReport], bad: tuple[BadRow, ...], **counts: Any
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


def make_plan(client: Client, images: ImageTable, comparison: Comparison, snapshot: Snapshot) -> ListingPlan:
    """Plan the run.

    In an empty store an image is read for its digest only if it may have an equal in the listing; else each that is
    new, or may have changed, is."""
    pending_P = pending_images(images, comparison)
    asked = slice(None) if comparison.num_stored else equal_candidates(images.sizes()[pending_P])
    digest_P = np.zeros(len(pending_P), DIGEST_DTYPE)
    digest_P[asked] = digest_all(client, images, pending_P[asked])
    return split(images, comparison, pending_P, digest_P, *find_digests(snapshot, digest_P))


def _as_stored(options: RefreshOptions, info: StoreInfo) -> RefreshOptions:
    """Fill in what the options leave open as the store has it. Raises WeightsError, SpecMismatchError."""
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
        compute_dtype=cast("AutoDType", stored_dtype),
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


def _check_gone(options: RefreshOptions, num_gone: int, comparison: Comparison, fault: str) -> None:
    advice = "is --images right? In jobs/refresh_features.py --keep-missing keeps them, --max-gone 1 lets them go"
    check_gone(options.store, num_gone, comparison.num_stored, options.max_gone, fault, advice)
