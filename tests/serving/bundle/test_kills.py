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
from serving.bundle.open import Bundle
from tests.fuse import FORK, Fuse
from tests.serving.bundle.conftest import export, versions_there
from tests.serving.bundle.test_publish import World
from tests.serving.scoring.variants import Variants

pytestmark = pytest.mark.services
EVERY = pytest.mark.parametrize(
    "step",
    [pytest.param(1_000, id="some", marks=pytest.mark.long(10)), pytest.param(1, id="all", marks=pytest.mark.slow)],
)


def deaths(work: Callable[[], Any], root: str, kept: str | Path, trace: Path, step: int) -> Iterator[None]:
    """Do `work` to its end once, then to its death at every `step`-th point and at the last of each name.

    Before each try the folder `root` becomes a copy of `kept`; after each death the block has what is left.
    """

    def die(at: int) -> int | None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(kept, root)
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
        yield


@EVERY
def test_a_killed_export_shows_all_of_a_version_or_nothing(
    exported: Variants, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    made, url = exported("exact"), str(tmp_path / "model")
    monkeypatch.setattr("serving.bundle.export.refuse_unsafe", lambda storage: None)
    monkeypatch.setattr("featurestore.store.refuse_unsafe", lambda storage: None)
    seen, storage = set(), Storage(url)
    for _ in deaths(lambda: export(url, made.run), url, made.url, tmp_path / "trace", step):
        known, in_use = log.known_versions(storage), log.version_in_use(storage)
        assert (known, in_use) in (([1], 1), ([1, 2], 1), ([1, 2], 2))
        seen.add((len(known), in_use))
        Bundle.open(url, known[-1], cache_dir=tmp_path / "cache").close()
        remove_leftovers(storage, grace_s=-1)
        assert versions_there(url) == known
    assert seen == {(1, 1), (2, 1), (2, 2)}


@EVERY
def test_a_killed_publish_shows_all_of_it_or_nothing(exported: Variants, tmp_path: Path, step: int) -> None:
    world = World(exported("plain"), tmp_path / "world")
    world.put(1_050, 1_051, 1_007)
    world.source.delete([1_010])
    url = world.vectors.url
    kept = shutil.copytree(url, tmp_path / "kept")
    seen = set()
    for _ in deaths(world.publish, url, kept, tmp_path / "trace", step):
        snapshot = FeatureStore.open(url).snapshot()
        assert (snapshot.version, snapshot.num_rows) in ((1, 48), (2, 49))
        seen.add(snapshot.version)
        assert not verify(FeatureStore.open(url)).problems
        report = world.publish()
        assert report.committed == (snapshot.version == 1)
    assert seen == {1, 2}
    world.check()
