"""What listing, comparing and planning hold in memory: numbers for each image, and objects for a few parts alone."""

import tracemalloc
import types

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from fsspec import AbstractFileSystem

from featurestore import ExtractorSpec, FeatureRows, FeatureStore, StoreInfo
from featurestore.keys import keys_of_uris
from pipeline.features import refresh
from pipeline.features import refresh as staged_run
from pipeline.features.part import PartReport, PartSettings
from pipeline.images.source import list_images

COUNT = 20_000
BATCH_ROWS = 3000  # as large beside COUNT as the real one beside 100,000
MOST_BYTES_PER_IMAGE = 350  # at the peak: it is 180, most of it one batch; with an object for each image above 430


class Drawn(AbstractFileSystem):
    """A bucket of drawn names, in pages as S3 gives them."""

    protocol = ("s3", "s3a")
    req_kw = types.MappingProxyType({})

    def info(self, path, **kwargs):
        return {"name": path, "type": "directory", "size": 0}

    def split_path(self, path):
        return "photos", "in", None

    def call_s3(self, method, Bucket, Prefix, ContinuationToken="0"):
        start = int(ContinuationToken)
        entries = [
            {
                "Key": f"{Prefix}{uri_of(number)}",
                "ETag": tag_of(number),
                "Size": 10_000 + number % 999,
                "LastModified": 1.0,
            }
            for number in range(start, min(start + 1000, COUNT))
        ]
        return {"Contents": entries, "IsTruncated": start + 1000 < COUNT, "NextContinuationToken": str(start + 1000)}


def uri_of(number):
    return f"{number // 1000:05d}/{number:09d}.jpg"


def tag_of(number):
    return xxhash.xxh3_128_hexdigest(str(number).encode())


def digest_of(key):
    return xxhash.xxh3_128_digest(str(key).encode())


def answers(client, function, calls):
    """The tasks as workers would do them, of images whose digest is that of their key."""
    for place, call in enumerate(calls):
        if function is staged_run.digest_images:
            yield place, [digest_of(ref.key) for ref in call[0]]
        else:
            yield place, PartReport(len(call[2]), len(call[2]), 0)


@pytest.fixture(params=[0, 98])
def store(request, tmp_path):
    """A store that has so many of a hundred of the images."""
    extractor = ExtractorSpec(
        backbone="none", layer="none", weights_digest="0", preprocessing="none", compute_dtype="float32"
    )
    store = FeatureStore.create(
        tmp_path / "features", StoreInfo(dim=1, num_shards=16, dtype="float32", extractor=extractor)
    )
    numbers = [number for number in range(COUNT) if number % 100 < request.param]
    if numbers:
        keys = keys_of_uris([uri_of(number) for number in numbers])
        rows = FeatureRows.of(
            [uri_of(number) for number in numbers], np.ones((len(numbers), 1), np.float32), keys=keys,
            content_digests=[digest_of(key) for key in keys.tolist()],
            source_tags=["old" if number % 100 == 0 else tag_of(number) for number in numbers],
        )  # fmt: skip
        store.put(rows)
    return store


@pytest.mark.long
def test_no_object_is_held_for_an_image(store, monkeypatch):
    monkeypatch.setattr("featurestore.storage.remote._client", lambda protocol, server: Drawn())
    monkeypatch.setattr("pipeline.images.imagetable.BATCH_ROWS", BATCH_ROWS)
    monkeypatch.setattr(staged_run, "run_tasks", answers)
    settings = PartSettings(store.url, "run", "", "", "", "float32", "float32", 1)
    snapshot = store.snapshot()
    in_arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        images = list_images("s3://photos/in").images
        plan = refresh.make_plan(None, images, refresh.compare(images, snapshot), snapshot)
        run = staged_run.ImageRun(None, store, settings, snapshot, [], 64)
        reports = run.compute(images, plan.compute_C, plan.digest_C, lambda: None)
        run.copy(images, plan.copies)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    num_stored = len(snapshot.keys())
    assert len(images) == COUNT
    assert plan.num_unchanged == num_stored - plan.num_touched
    assert sum(report.num_rows for report in reports) == len(plan.compute_C) == COUNT - num_stored
    assert peak_bytes / COUNT < MOST_BYTES_PER_IMAGE
    assert pa.total_allocated_bytes() - in_arrow < 8 * COUNT
