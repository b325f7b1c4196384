"""Small stores: 8 shards, 8 numbers per row, drawn features."""

import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from featurestore import ExtractorSpec, FeatureRows, FeatureStore, StoreInfo, to_bits
from tests.proxy import Proxy, proxy_before
from tests.servers import environment_of

INFO = StoreInfo(
    dim=8,
    num_shards=8,
    dtype="bfloat16",
    extractor=ExtractorSpec(
        backbone="vgg16", layer="fc6", weights_digest="0" * 64, preprocessing="resize 256", compute_dtype="bfloat16"
    ),
)


@pytest.fixture
def info(request: pytest.FixtureRequest) -> StoreInfo:
    """Of 8 shards, or of as many as the module says: each is a file of each commit."""
    return INFO.model_copy(update={"num_shards": getattr(request.module, "NUM_SHARDS", INFO.num_shards)})


def make_rows(uris: list[str] | int, info: StoreInfo, seed: int = 0, first: int = 0) -> FeatureRows:
    """Draw rows of these images, or of so many from images/`first`.jpg on."""
    names = uris if isinstance(uris, list) else [f"images/{i}.jpg" for i in range(first, first + uris)]
    values = np.random.default_rng(seed).standard_normal((len(names), info.dim)).astype(np.float32)
    return FeatureRows.of(
        names,
        to_bits(values, info.dtype),
        content_digests=[bytes([i % 256] * 15 + [0]) for i in range(len(names))],
        source_tags=[f"tag-{seed}-{i}" for i in range(len(names))],
        widths=np.arange(len(names)),
        heights=np.arange(len(names)) + seed,
    )


def put(store: FeatureStore, uris: list[str] | int, seed: int = 0, first: int = 0) -> FeatureRows:
    """Put drawn rows into a store; return them."""
    rows = make_rows(uris, store.info, seed, first)
    store.put(rows)
    return rows


@pytest.fixture
def store(tmp_path: Path, info: StoreInfo) -> FeatureStore:
    return FeatureStore.create(tmp_path / "store", info)


@pytest.fixture
def rows(store: FeatureStore) -> FeatureRows:
    """200 rows, which are in the store."""
    return put(store, 200)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache folder of the test's own."""
    return tmp_path / "cache"


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[Proxy]:
    """A real server behind a proxy that does nothing yet; the environment leads to it."""
    with proxy_before(s3_endpoint) as proxy, environment_of(proxy.endpoint):
        yield proxy


@pytest.fixture(params=["disk", "memory", "s3"])
def place_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An address where nothing is yet, on everything that a store may lie on."""
    if request.param == "disk":
        return str(tmp_path / "place")
    return f"{request.getfixturevalue(f'{request.param}_url')}/place"


@pytest.fixture(scope="module")
def filled_folders() -> dict[str, Path]:
    """Stores that the tests of a module begin with, by the name of what fills them; only to be copied."""
    return {}


@pytest.fixture
def filled_by(
    store: FeatureStore, filled_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Callable[[FeatureStore], object]], FeatureStore]:
    """Fill the store; but the first time in a module, with a copy of what was made then."""

    def filled(fill: Callable[[FeatureStore], object]) -> FeatureStore:
        name = fill.__qualname__
        if name not in filled_folders:
            fill(store)
            filled_folders[name] = tmp_path_factory.mktemp("filled") / "store"
            shutil.copytree(store.url, filled_folders[name])
            return store
        shutil.rmtree(store.url)
        return FeatureStore.open(shutil.copytree(filled_folders[name], store.url))

    return filled


def fill(store: FeatureStore, count: int = 400, newer: int = 200, gone: int = 20) -> None:
    """Put rows of three ages: `count` images, newer rows of the first of them, and tombstones of the first of those."""
    put(store, count)
    put(store, newer, seed=1)
    store.delete(make_rows(gone, store.info).keys_N)


@pytest.fixture
def filled(filled_by) -> FeatureStore:
    return filled_by(fill)


@pytest.fixture
def nine(filled_by) -> FeatureStore:
    """Versions 1 to 9 of one row."""

    def nine_puts(store: FeatureStore) -> None:
        for version in range(1, 10):
            put(store, 1, seed=version)

    return filled_by(nine_puts)


@pytest.fixture
def memory_url() -> Iterator[str]:
    url = f"memory://{uuid.uuid4().hex}/store"
    yield url
    files = fsspec.filesystem("memory")
    if files.exists(url):
        files.rm(url, recursive=True)
