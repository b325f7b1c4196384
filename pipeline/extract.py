"""Images to features, once per image: list, plan, run the parts on Dask, build shards, commit.

A run that was killed goes on where it was when the same command runs again: its parts are staged in the store under a
run id made from the inputs. Images that the store has already, under the same tag, are not touched.
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from distributed import Client

from featurestore.errors import StoreNotFoundError
from featurestore.quarantine import QuarantineRow
from featurestore.spec import DType, ExtractorSpec, FileEntry, StoreInfo
from featurestore.store import FeatureStore
from pipeline.backbone import (
    DEFAULT_BACKBONE,
    ComputeDType,
    backbone,
    check_weights_name,
    fastest_dtype,
    feature_dim,
    warn_if_untrained,
)
from pipeline.checks import wait_for_workers
from pipeline.errors import ExtractionError, WeightsError
from pipeline.parts import (
    BadImage,
    PartReport,
    PartSettings,
    digest_images,
    extract_part,
    host_of,
    try_image,
)
from pipeline.plan import Part, equal_candidates, make_parts, pending_images, run_id_of
from pipeline.progress import progress
from pipeline.source import ImageRef, list_images
from pipeline.tasks import Killed, num_threads, run_alone, run_tasks

DIGESTS_PER_TASK = 1024
WORKERS_TIMEOUT_S = 60.0
SHARD_TASKS_PER_THREAD = 2


@dataclass(frozen=True)
class ExtractOptions:
    """What to extract, and how. `num_shards` and `name` count when the store is made."""

    images: str
    store: str
    weights: str = "imagenet"
    dtype: DType = "bfloat16"
    compute_dtype: ComputeDType | Literal["auto"] = "auto"
    batch_size: int = 16
    part_size: int = 256
    num_shards: int | None = None
    name: str | None = None
    backbone: str = DEFAULT_BACKBONE  # MODEL:LAYER


@dataclass(frozen=True)
class ExtractSummary:
    """What an extraction did. All numbers but `num_images` and `num_present` are of images of this run."""

    num_images: int  # listed
    num_ignored: int  # files that are no images by their extension, or repeated rows of a table
    num_present: int  # unchanged in the store
    num_resumed: int  # staged by an earlier, killed run
    num_computed: int  # images through the network, earlier runs' included
    num_duplicates: int
    bad: tuple[BadImage, ...]
    seconds: float
    store: str
    snapshot: int

    @property
    def images_per_s(self) -> float:
        """Images that this run itself worked on, bad ones included, in a second."""
        return (self.num_images - self.num_present - self.num_resumed) / max(self.seconds, 1e-9)


def extract(options: ExtractOptions, client: Client) -> ExtractSummary:
    """Bring the store up to date with the images; one commit. Nothing is computed when nothing has changed.

    Raises SourceError, WeightsError, ExtractionError, ClusterError and the errors of featurestore; what was staged by
    then stays for the next run. Random weights give an UntrainedWeightsWarning.
    """
    start_s = time.monotonic()
    num_shards = options.num_shards
    if num_shards is not None and (num_shards < 1 or num_shards & (num_shards - 1)):
        raise ExtractionError(f"num_shards={num_shards} is not a power of two; try 64 or 128")
    weights = check_weights_name(options.weights)
    warn_if_untrained(weights)
    listing = list_images(options.images)
    wait_for_workers(client, str(client.scheduler_info()["address"]), 1, WORKERS_TIMEOUT_S)
    spec = describe_network(client, options.backbone, weights, options.compute_dtype)
    store = open_store(options, spec)
    snapshot = store.snapshot()
    pending = pending_images(listing.images, snapshot)
    run = _Run(
        client, store, options, weights, spec, run_id_of(listing.images, spec.digest, options.dtype, options.part_size)
    )
    reports, num_resumed = run.compute(pending) if pending else ({}, 0)
    bad = tuple(sorted((bad for report in reports.values() for bad in report.bad), key=lambda bad: bad.uri))
    add_quarantine(store, bad)
    num_rows = sum(report.num_rows for report in reports.values())
    if bad and not num_rows and len(pending) == len(listing.images):
        store.discard_staging(run.settings.run_id)  # the next run looks at all files again
        raise ExtractionError(f"none of the {len(bad):,} images can be used: {describe_bad(bad)}")
    if num_rows:
        snapshot = store.commit(run.build_shards(list(reports)), "extract", num_quarantined=len(bad))
    store.discard_staging(run.settings.run_id)
    return ExtractSummary(
        num_images=len(listing.images),
        num_ignored=listing.num_ignored,
        num_present=len(listing.images) - len(pending),
        num_resumed=num_resumed,
        num_computed=sum(report.num_computed for report in reports.values()),
        num_duplicates=sum(report.num_duplicates for report in reports.values()),
        bad=bad,
        seconds=time.monotonic() - start_s,
        store=store.url,
        snapshot=snapshot.version,
    )


def describe_network(
    client: Client, backbone_name: str, weights: str, compute_dtype: ComputeDType | Literal["auto"]
) -> ExtractorSpec:
    """The spec of the network as a worker builds it, who keeps it. `auto` is what all workers are fast in."""
    if compute_dtype == "auto":
        fastest = set(client.run(fastest_dtype).values())
        compute_dtype = "bfloat16" if fastest == {"bfloat16"} else "float32"
    spec: ExtractorSpec | WeightsError | Killed = run_alone(client, _spec_of, backbone_name, weights, compute_dtype)
    if isinstance(spec, Killed):
        raise ExtractionError("building the network brings the workers down: is there memory for 1 GB more in each?")
    if isinstance(spec, WeightsError):
        raise spec
    return spec


def open_store(options: ExtractOptions, spec: ExtractorSpec) -> FeatureStore:
    """The store, made when it is new. Raises SpecMismatchError when it is of another network, dtype or layout."""
    dim = feature_dim(options.backbone)
    try:
        existing = FeatureStore.open(options.store).info
    except StoreNotFoundError:
        existing = StoreInfo(dim=dim, extractor=spec)
    info = existing.model_copy(update={"dim": dim, "dtype": options.dtype, "extractor": spec})
    wanted = {"num_shards": options.num_shards, "name": options.name}
    changed = {name: value for name, value in wanted.items() if value is not None}
    return FeatureStore.open_or_create(options.store, StoreInfo.model_validate(info.model_dump() | changed))


def add_quarantine(store: FeatureStore, bad: Iterable[BadImage]) -> None:
    """Keep the bad images in the store's quarantine; those that stand there for the same reason stay as they are."""
    known = {(row.key, row.uri, row.reason) for row in store.quarantine_rows()}
    store.add_quarantine([QuarantineRow(*image, time.time()) for image in bad if tuple(image) not in known])


def describe_bad(bad: Sequence[BadImage], num_names: int = 3) -> str:
    """Reasons with their numbers and the first names."""
    texts = []
    for reason, count in Counter(image.reason for image in bad).most_common():
        names = [image.uri for image in bad if image.reason == reason]
        more = ", …" if count > num_names else ""
        texts.append(f"{count:,} {reason} ({', '.join(names[:num_names])}{more})")
    return "; ".join(texts)


class _Run:
    """One extraction on its cluster."""

    def __init__(
        self,
        client: Client,
        store: FeatureStore,
        options: ExtractOptions,
        weights: str,
        spec: ExtractorSpec,
        run_id: str,
    ) -> None:
        self._client = client
        self._store = store
        self._part_size = options.part_size
        workers = client.scheduler_info(n_workers=-1)["workers"]
        self.settings = PartSettings(
            store=store.url,
            run_id=run_id,
            backbone=options.backbone,
            weights=weights,
            spec_digest=spec.digest,
            compute_dtype=cast("ComputeDType", spec.compute_dtype),
            dtype=options.dtype,
            batch_size=options.batch_size,
            workers_per_host=dict(Counter(host_of(address) for address in workers)),
        )

    def compute(self, pending: Sequence[ImageRef]) -> tuple[dict[str, PartReport], int]:
        """Stage all parts: the reports by part, and how many images were staged by an earlier run."""
        parts = self._plan(pending)
        staged = set(self._store.staged_parts(self.settings.run_id))
        waiting = [part for part in parts if part.name not in staged]
        reports = {part.name: self._load_report(part.name) for part in parts if part.name in staged}
        num_resumed = sum(len(part.refs) for part in parts if part.name in staged)
        suspects = []
        with progress("extracting", len(pending), num_resumed) as advance:
            calls = [(self.settings, part.name, part.refs) for part in waiting]
            for index, report in run_tasks(self._client, extract_part, calls):
                if isinstance(report, Killed):
                    suspects.append(waiting[index])
                    continue
                reports[waiting[index].name] = report
                advance(len(waiting[index].refs))
            for part in suspects:
                reports[part.name] = self._compute_suspect(part)
                advance(len(part.refs))
        return {part.name: reports[part.name] for part in parts}, num_resumed

    def build_shards(self, parts: list[str]) -> dict[int, FileEntry]:
        """The data files of all shards that got rows."""
        num_shards = self._store.info.num_shards
        num_tasks = min(num_shards, SHARD_TASKS_PER_THREAD * num_threads(self._client))
        calls = [
            (self._store, self.settings.run_id, range(first, num_shards, num_tasks), parts)
            for first in range(num_tasks)
        ]
        entries: dict[int, FileEntry] = {}
        for _, built in run_tasks(self._client, _build_shards, calls):
            if isinstance(built, Killed):
                raise ExtractionError("building the shards brings the workers down: more shards need less memory each")
            entries |= built
        return entries

    def _plan(self, pending: Sequence[ImageRef]) -> list[Part]:
        candidates = equal_candidates(pending)
        chunks = [candidates[i : i + DIGESTS_PER_TASK] for i in range(0, len(candidates), DIGESTS_PER_TASK)]
        digests: dict[int, bytes] = {}
        with progress("comparing", len(candidates)) as advance:
            for index, found in run_tasks(self._client, digest_images, [(chunk,) for chunk in chunks]):
                advance(len(chunks[index]))
                if not isinstance(found, Killed):  # then equal images are computed twice, and equally
                    digests |= {ref.key: digest for ref, digest in zip(chunks[index], found, strict=True)}
        return make_parts(pending, lambda ref: digests.get(ref.key, b""), self._part_size)

    def _load_report(self, part: str) -> PartReport:
        return PartReport.load(self._store.url, self.settings.run_id, part)

    def _compute_suspect(self, part: Part) -> PartReport:
        """A part that ran when workers died, now alone, without the images that bring a worker down by themselves."""
        guilty = [ref for ref in part.refs if isinstance(run_alone(self._client, try_image, ref), Killed)]
        refs = [ref for ref in part.refs if ref not in guilty]
        bad = tuple(BadImage(ref.key, ref.uri, "brings down the process that decodes it") for ref in guilty)
        report: PartReport | Killed = run_alone(self._client, extract_part, self.settings, part.name, refs, 1, bad)
        if isinstance(report, Killed):
            raise ExtractionError(
                f"workers die while they compute part {part.name} ({refs[0].uri} and {len(refs) - 1} more), though each"
                " image can be decoded: give workers more memory, or set a smaller --batch-size"
            )
        return report


def _spec_of(backbone_name: str, weights: str, compute_dtype: ComputeDType) -> ExtractorSpec | WeightsError:
    """The error as a result: Dask would log a raised one with its traceback, and try again."""
    try:
        return backbone(backbone_name, weights, compute_dtype).spec
    except WeightsError as error:
        return error


def _build_shards(store: FeatureStore, run_id: str, shards: Iterable[int], parts: list[str]) -> dict[int, FileEntry]:
    entries = {shard: store.build_shard(run_id, shard, parts) for shard in shards}
    return {shard: entry for shard, entry in entries.items() if entry is not None}
