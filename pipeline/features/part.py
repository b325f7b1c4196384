"""One part of an extraction: its images decoded, run through the network, or copied.

Threads read and decode ahead of the network, so that it never waits. Bytes that were seen before in the part are
neither decoded nor computed again: their row is a copy under its own key. torch is imported where the network is: a
job that sends parts, and a worker that compares images, do without.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from featurestore.format.datafile import FeatureRows
from featurestore.format.shard import take_rows
from featurestore.keys import AnyArray, Int64Array, shard_of, splitmix64
from featurestore.spec import ExtractorSpec, Int8Spec
from featurestore.storage.storage import in_threads
from featurestore.store import FeatureStore, Snapshot
from pipeline.errors import BackboneError, BadImageError, WeightsError
from pipeline.images.decode import Pixels, Preset, prepare
from pipeline.images.source import ImageRef, read_image
from pipeline.problems import Problem
from pipeline.store_run import BadRow, StagedReport

if TYPE_CHECKING:
    from pipeline.network.backbone import Backbone


DEADLY = "brings down the process that decodes it"
DIGEST_THREADS = 8  # reading and hashing; both wait more than they compute
LEAST_DECODE_THREADS = 4  # reading is waiting


@dataclass(frozen=True)
class PartSettings:
    """Settings that all parts of a run share."""

    store: str
    run_id: str
    backbone: str  # MODEL:LAYER
    weights: str
    extractor: ExtractorSpec
    version: int  # of the snapshot that copies are of
    batch_size: int
    part_size: int  # images, at least
    workers_per_host: int = 1  # at most


@dataclass(frozen=True, kw_only=True)
class PartReport(StagedReport):
    """The outcome for each image of a part; written before the rows, since these make the part complete."""

    num_computed: int = 0  # images that went through the network
    num_duplicates: int = 0  # rows copied from an image of equal bytes


class LoadedImage(NamedTuple):
    """One image on its way; exactly one of `pixels`, `bad` and (a duplicate) neither."""

    ref: ImageRef
    digest: bytes  # xxh3-128 of the file's bytes; empty when it could not be read
    pixels: Pixels | None
    bad: str | None


def stage_part(
    settings: PartSettings,
    part: str,
    refs: Sequence[ImageRef],
    source_keys: Sequence[int] | None = None,
    decode_threads: int | None = None,
    deadly: Collection[int] = (),
) -> PartReport:
    """Stage the features of `refs` as `part` of the run: computed, or copied from the rows of `source_keys`.

    Bad images are reported, not raised. The keys in `deadly` bring down their decoder's process: they are reported, not
    touched. Raises WeightsError when this worker's network is another than the run's, MissingKeysError where a source
    is not in the snapshot, StorageError.
    """
    store = FeatureStore.open(settings.store)
    if source_keys is None:
        safe = [ref for ref in refs if ref.key not in deadly]
        report, rows = _computed(settings, store, safe, decode_threads)
        report = replace(
            report, bad=(*report.bad, *(BadRow(ref.key, ref.uri, DEADLY) for ref in refs if ref.key in deadly))
        )
    else:
        rows = _copied(store.snapshot(settings.version), refs, np.array(source_keys, np.int64))
        report = PartReport(num_rows=len(refs))
    report.save(store, settings.run_id, part)
    store.stage_part(settings.run_id, part, rows)
    return report


def _computed(
    settings: PartSettings, store: FeatureStore, refs: Sequence[ImageRef], decode_threads: int | None
) -> tuple[PartReport, FeatureRows]:
    """Read and decode images in threads, run the network on those of different bytes, and make a row of each."""
    network = _network(settings)
    images: list[tuple[ImageRef, bytes, str | None]] = []  # with digest, and why there are no pixels
    found: dict[bytes, tuple[AnyArray, int, int]] = {}  # by digest: the feature's bits, width and height
    faults: dict[bytes, str] = {}
    num_threads = decode_threads or max(LEAST_DECODE_THREADS, len(os.sched_getaffinity(0)))
    ahead = 2 * max(settings.batch_size, num_threads)

    def decoded() -> Iterator[tuple[bytes, Pixels]]:
        for image in in_threads(partial(_load, network.preset, {}), refs, num_threads, ahead=ahead):
            images.append((image.ref, image.digest, image.bad))
            if image.bad is not None:
                faults[image.digest] = image.bad
            elif image.pixels is not None:
                yield image.digest, image.pixels

    waiting, num_computed = decoded(), 0
    while batch := list(islice(waiting, settings.batch_size)):
        num_computed += len(batch)
        values_BD = store.project(network.features(np.stack([pixels.pixels_HWC for _, pixels in batch])))
        bits_BD, storable_B = store.codec.encode_storable(values_BD)
        for (digest, pixels), bits_D, is_storable in zip(batch, bits_BD, storable_B, strict=True):
            if is_storable:
                found[digest] = (bits_D, pixels.width, pixels.height)
            else:
                faults[digest] = f"a feature is not finite in {store.info.dtype}"
    bad = tuple(
        BadRow(ref.key, ref.uri, reason or faults[digest], digest != b"")
        for ref, digest, reason in images
        if digest not in found
    )
    good = [(ref, digest) for ref, digest, _ in images if digest in found]
    bits, widths, heights = zip(*(found[digest] for _, digest in good), strict=True) if good else ((), (), ())
    features_KD = np.stack(bits) if bits else np.zeros((0, store.info.dim), store.info.storage_dtype)
    rows = _rows([ref for ref, _ in good], features_KD, [digest for _, digest in good], widths, heights)
    report = PartReport(num_rows=len(good), num_computed=num_computed, num_duplicates=len(good) - len(found), bad=bad)
    return report, rows


def _network(settings: PartSettings) -> "Backbone":
    """Build the network of the run, with this worker's share of its host's cores."""
    import torch

    from pipeline.network.backbone import backbone

    network = backbone(settings.backbone, settings.weights, settings.extractor.precision)
    if network.spec != settings.extractor:
        raise WeightsError(Problem.WEIGHTS_DIFFER, settings.weights)
    torch.set_num_threads(torch_threads(settings.workers_per_host))
    return network


def _rows(
    refs: Sequence[ImageRef], features_KD: AnyArray, digests: list[Any], widths: Any, heights: Any
) -> FeatureRows:
    return FeatureRows.of(
        [ref.uri for ref in refs],
        features_KD,
        keys=np.array([ref.key for ref in refs], np.int64),
        content_digests=digests,
        source_tags=[ref.source_tag for ref in refs],
        widths=widths,
        heights=heights,
    )


def digest_images(refs: Sequence[ImageRef]) -> list[bytes]:
    """Hash each file's bytes by xxh3-128, in the order of `refs`; empty where it cannot be read."""

    def digest(ref: ImageRef) -> bytes:
        try:
            return xxhash.xxh3_128_digest(read_image(ref.location))
        except BadImageError:
            return b""

    return list(in_threads(digest, refs, DIGEST_THREADS))


def try_image(settings: PartSettings, ref: ImageRef) -> None:
    """Read and decode one image and forget it: done alone, it shows whether this image brings a worker down."""
    from pipeline.network.backbone import preset_of

    _load(preset_of(settings.backbone, settings.weights), {}, ref)


def calibrate(backbone_name: str, weights: str, refs: Sequence[ImageRef]) -> Int8Spec:
    """Calibrate the network for int8, and measure the cost, on the good ones of these images.

    Raises BackboneError where there are not two of them, WeightsError.
    """
    from pipeline.network.backbone import calibrated, load_weights, network_of, normalised

    network = network_of(backbone_name, weights)
    loaded = in_threads(partial(_load, network.preset, {}), refs, LEAST_DECODE_THREADS)
    good = [image.pixels.pixels_HWC for image in loaded if image.pixels is not None]
    if len(good) < 2:
        raise BackboneError(Problem.TOO_FEW_FOR_INT8, len(good), len(refs))
    layers = network.filled(load_weights(network, weights))
    return calibrated(layers, normalised(np.stack(good), network.preset))


def torch_threads(workers_per_host: int) -> int:
    """Return a process's share of its host's cores, for this number of processes."""
    return max(1, len(os.sched_getaffinity(0)) // workers_per_host)


def _load(preset: Preset, first: dict[bytes, int], ref: ImageRef) -> LoadedImage:
    """Read and decode an image; not one whose bytes are in `first`, by their digest, under another key."""
    digest = b""
    try:
        data = read_image(ref.location)
        digest = xxhash.xxh3_128_digest(data)
        is_first = first.setdefault(digest, ref.key) == ref.key  # atomic, for threads
        return LoadedImage(ref, digest, prepare(data, preset) if is_first else None, None)
    except BadImageError as error:
        return LoadedImage(ref, digest, None, str(error))


_DESCRIPTION = ["key", "content_digest", "width", "height"]


def _copied(snapshot: Snapshot, refs: Sequence[ImageRef], source_key_K: Int64Array) -> FeatureRows:
    """Make a row for each of `refs`: its own key, uri and tag, all else from its source.

    Reads the row groups around the sources. Raises MissingKeysError.
    """
    features_KD = snapshot.get(source_key_K)
    described = _described(snapshot, source_key_K)
    digests: list[Any] = described["content_digest"].to_pylist()
    return _rows(refs, features_KD, digests, described["width"].to_numpy(), described["height"].to_numpy())


def _described(snapshot: Snapshot, keys_K: Int64Array) -> pa.Table:
    """Read the small columns of `keys_K`, which are all there, in their order."""
    shard_K = shard_of(keys_K, snapshot.info.num_shards)
    tables, order = [], []
    for shard in np.unique(shard_K):
        here_K = np.flatnonzero(shard_K == shard)
        table = snapshot.shard_reader(int(shard)).read(_DESCRIPTION)
        place_K = np.searchsorted(splitmix64(table["key"].to_numpy()), splitmix64(keys_K[here_K]))
        tables.append(take_rows(table, place_K))
        order.append(here_K)
    return take_rows(pa.concat_tables(tables), np.argsort(np.concatenate(order)))
