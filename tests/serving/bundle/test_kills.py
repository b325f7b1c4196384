"""SIGKILL of an export and of a publish at each thing they do to files: all of it is seen afterwards, or nothing."""

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from featurestore.upkeep.verify import verify
from serving.bundle import log
from serving.bundle.log import remove_leftovers
from serving.bundle.manifest import BUNDLES
from serving.bundle.open import Bundle
from tests.fuse import FORK, Fuse
from tests.serving.bundle.conftest import export
from tests.serving.bundle.test_publish import World
from tests.serving.scoring.variants import Variants

pytestmark = pytest.mark.services
EVERY = pytest.mark.parametrize(
    "step",
    [pytest.param(1_000, id="some", marks=pytest.mark.long(10)), pytest.param(1, id="all", marks=pytest.mark.slow)],
)


def deaths(work: Callable[[], Any], root: str, trace: Path, step: int, renew: Callable[[], None]) -> Iterator[str]:
    """Do `work` to its end once, then to its death at every `step`-th point and at the last of each name.

    Yields the name of the point after each death; `renew` is called before each try.
    """

    def die(at: int) -> int | None:
        renew()
        fuse = Fuse(at, trace)

        def watched() -> None:
            fuse.watch_disk(root)
            work()

        process = FORK.Process(target=watched)
        process.start()
        process.join()
        return process.exitcode

    assert die(0) == 0
    points = trace.read_text().splitlines()
    last = {name: place for place, name in enumerate(points)}
    for point in sorted({*last.values(), *range(0, len(points), step)}):
        assert die(point + 1) == -signal.SIGKILL
        yield points[point]


@EVERY
def test_a_killed_export_shows_all_of_a_version_or_nothing(
    exported: Variants, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    made = exported("exact")
    url = str(tmp_path / "model")
    monkeypatch.setattr("serving.bundle.export.refuse_unsafe", lambda storage: None)
    monkeypatch.setattr("featurestore.store.refuse_unsafe", lambda storage: None)

    def renew() -> None:
        shutil.rmtree(url, ignore_errors=True)
        shutil.copytree(made.url, url)

    seen = set()
    storage = Storage(url)
    for _ in deaths(lambda: export(url, made.run), url, tmp_path / "trace", step, renew):
        known = log.known_versions(storage)
        in_use = log.version_in_use(storage)
        assert (known, in_use) in (([1], 1), ([1, 2], 1), ([1, 2], 2))
        seen.add((len(known), in_use))
        Bundle.open(url, known[-1], cache_dir=tmp_path / "cache").close()
        remove_leftovers(storage, grace_s=-1)
        named = {log.read_version(storage, version).bundle_id for version in known}
        left = {
            path.relative_to(Path(url, BUNDLES)).parts[0] for path in Path(url, BUNDLES).rglob("*") if path.is_file()
        }
        assert left == named
    assert seen == {(1, 1), (2, 1), (2, 2)}


@EVERY
def test_a_killed_publish_shows_all_of_it_or_nothing(exported: Variants, tmp_path: Path, step: int) -> None:
    (tmp_path / "world").mkdir()
    world = World(exported("plain"), tmp_path / "world")
    world.put(1_050, 1_051, 1_007)
    world.source.delete([1_010])
    bundle = world.open()
    url, kept = bundle.vectors_url(bundle.manifest.vectors[0]), tmp_path / "kept"
    bundle.close()
    shutil.copytree(url, kept)

    def renew() -> None:
        shutil.rmtree(url)
        shutil.copytree(kept, url)

    seen = set()
    before, after = 48, 49
    for _ in deaths(world.publish, url, tmp_path / "trace", step, renew):
        snapshot = FeatureStore.open(url).snapshot()
        assert (snapshot.version, snapshot.num_rows) in ((1, before), (2, after))
        seen.add(snapshot.version)
        assert not verify(FeatureStore.open(url)).problems
        report = world.publish()
        assert report.committed == (snapshot.version == 1)
    assert seen == {1, 2}
    world.check()
