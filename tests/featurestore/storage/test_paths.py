"""What a file of a store names lies below the store, and no link leads out of it: for reading, writing and removing."""

import hashlib
import json
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from featurestore import FeaturePartition, FeatureStore, QuarantineRow
from featurestore.__main__ import app
from featurestore.errors import CorruptFileError
from featurestore.log import manifest_path
from featurestore.problems import Problem
from featurestore.spec import Manifest, ReductionSpec, unseal
from featurestore.storage.storage import Storage
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import expire
from featurestore.upkeep.history import pin, unpin
from featurestore.upkeep.verify import noted_paths, repair, verify
from tests.cli import invoke
from tests.featurestore.conftest import make_rows, put
from tests.featurestore.contents import SHARD, everything, files_of
from tests.raised import compare, raises, told

NUM_SHARDS = 4
OUTSIDE = [
    "/etc/passwd", "data/../../outside/x.parquet", "../x", "..", ".", "", "data//x", "data/", "/", "data/./x",
    "data\\..\\x", "data/x\0", "file:///etc/passwd", "s3://other/x", "data/\nx", "C:x", "data/.tmp-1",
]  # fmt: skip


@pytest.fixture
def filled(filled_by) -> FeatureStore:
    """Large enough for statistics; with a second snapshot, a pin and a quarantined image."""

    def fill(store: FeatureStore) -> None:
        put(store, 300)
        put(store, 50, seed=1)
        store.add_quarantine([QuarantineRow(1, "bad.jpg", "not an image", 1.0)])
        pin(store, "best", 1)

    return filled_by(fill)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    return folder


def sealed(fields: dict[str, Any]) -> bytes:
    """What `seal` would make of them, did they not have to be valid."""
    body = json.dumps(fields, indent=1).encode()
    return json.dumps({**fields, "digest": hashlib.sha256(body).hexdigest()}, indent=1).encode()


def link_out(store: FeatureStore, path: str, outside: Path) -> Path:
    """Move a file or folder of the store out of it, and leave a link; where it went."""
    place, target = Path(store.url) / path, outside / Path(path).name
    shutil.move(place, target)
    place.symlink_to(target)
    return target


def files_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("field", ["path", "statistics_path"])
def test_a_manifest_that_names_a_path_out_of_the_store_is_damaged(filled: FeatureStore, field: str) -> None:
    place, fields = Path(filled.url) / manifest_path(2), filled.snapshot().manifest.model_dump(mode="json")
    for path in OUTSIDE:
        fields["shards"][str(SHARD)][0][field] = path
        reason = re.compile(rf"^{re.escape(f'shards.{SHARD}.0.{field}={path!r}: ')}(?!.*Value error)")
        with raises(CorruptFileError, Problem.DAMAGED, where=place, reason=reason) as caught:
            unseal(sealed(fields), Manifest, str(place))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    place.write_bytes(sealed(fields))
    with pytest.raises(CorruptFileError):
        compact(filled, force=True)
    (problem,) = verify(filled).problems
    assert problem.kind == "manifest" and problem.path == manifest_path(2)
    assert repair(filled).version == 3
    assert verify(filled).problems == [] and filled.snapshot().manifest.shards == filled.snapshot(1).manifest.shards


def test_the_paths_that_stores_have_are_accepted_quickly(filled: FeatureStore) -> None:
    for path in ("data/0003/0a.parquet", "basis/a.safetensors", "data/0003/ä b+c=d@2..parquet"):
        assert ReductionSpec(path=path, sha256="", full_dim=1).path == path
    data = (Path(filled.url) / manifest_path(2)).read_bytes()
    assert unseal(data, Manifest, "x").num_files == 8
    assert sealed(filled.snapshot().manifest.model_dump(mode="json")) == data, "the seal of this test is another"


@pytest.mark.parametrize("path", ["basis/../../outside/c.safetensors", "/etc/passwd"])
def test_store_json_and_notes_are_held_to_it_too(filled: FeatureStore, path: str) -> None:
    fields = filled.info.model_dump(mode="json")
    fields["reduction"] = {"kind": "principal components", "path": path, "sha256": "0" * 64, "full_dim": 9}
    (Path(filled.url) / "store.json").write_bytes(sealed(fields))
    where = filled.storage.full("store.json")
    with raises(CorruptFileError, Problem.DAMAGED, where=where, reason=re.compile("^reduction.path")):
        FeatureStore.open(filled.url)
    assert [problem.kind for problem in verify(filled.url).problems] == ["info"]
    repair(filled.url)
    assert FeatureStore.open(filled.url).info.reduction is None and verify(filled.url).problems == []
    note = {"format_version": 1, "path": path, "reason": "", "time_s": 1.0}
    filled.storage.write_bytes("damaged/note-1.json", sealed(note))
    assert noted_paths(filled.storage) == set()


@pytest.mark.parametrize("kind", ["file", "folder of a shard", "statistics"])
def test_a_link_in_data_leading_out_is_damage(filled: FeatureStore, outside: Path, tmp_path: Path, kind: str) -> None:
    entry, folder = files_of(filled)[0], f"data/{SHARD:04d}"
    path = {"file": entry.path, "folder of a shard": folder, "statistics": str(entry.statistics_path)}[kind]
    target = link_out(filled, path, outside)
    before = files_below(outside)
    looks: list[Callable[[], object]] = [
        lambda: FeaturePartition.load(filled, cache_dir=tmp_path / "cache"),
        lambda: filled.snapshot().shard_reader(SHARD).read(),
        lambda: compact(filled, force=True),
        lambda: pickle.loads(pickle.dumps(filled)).storage.read_bytes(entry.path),
    ]
    for look in looks if kind != "statistics" else [lambda: filled.snapshot(1).statistics()]:
        with raises(CorruptFileError, Problem.LINK_LEADS_OUT, link=Path(filled.url) / path, target=target):
            look()
    problems = verify(filled).problems
    for problem in problems:
        compare(problem.error, Problem.LINK_LEADS_OUT, link=Path(filled.url) / path, target=target)
    assert problems
    repair(filled)
    assert verify(filled).problems == []
    if kind == "folder of a shard":
        with raises(CorruptFileError, Problem.LINK_LEADS_OUT, link=Path(filled.url) / path, target=target):
            put(filled, 100)
        (Path(filled.url) / path).unlink()
    put(filled, 100)
    assert verify(filled).problems == [] and files_below(outside) == before


def test_a_manifest_behind_a_link_is_put_aside_without_its_content(filled: FeatureStore, outside: Path) -> None:
    target = link_out(filled, manifest_path(2), outside)
    before = files_below(outside)
    with raises(CorruptFileError, Problem.LINK_LEADS_OUT, target=target):
        filled.snapshot()
    assert [problem.kind for problem in verify(filled).problems] == ["manifest"]
    assert repair(filled).version == 3
    assert filled.storage.read_bytes(f"damaged/log-{2:020d}.json") == b""
    assert files_below(outside) == before and verify(filled).problems == []


def test_pins_and_quarantine_files_behind_links_have_their_ways_out(filled: FeatureStore, outside: Path) -> None:
    link_out(filled, "pins/best.json", outside)
    name = filled.storage.list("quarantine")[0]
    target = link_out(filled, f"quarantine/{name}", outside)
    before = files_below(outside)
    with raises(CorruptFileError, Problem.LINK_LEADS_OUT, target=target):
        filled.quarantine_rows()
    assert sorted(problem.kind for problem in verify(filled).problems) == ["pin", "quarantine"]
    repair(filled)
    unpin(filled, "best")
    assert verify(filled).problems == [] and files_below(outside) == before


@pytest.mark.parametrize("folder", ["log", "data", "quarantine", "pins", "damaged", "staging", "expired", "basis"])
def test_a_folder_that_is_a_link_is_named_and_left_alone(filled: FeatureStore, outside: Path, folder: str) -> None:
    filled.stage_part("run", "1", make_rows(5, filled.info))
    (Path(filled.url) / folder).mkdir(exist_ok=True)
    found = {"link": Path(filled.url) / folder, "target": link_out(filled, folder, outside)}
    before = files_below(outside)
    (problem,) = verify(filled).problems
    assert (problem.kind, problem.path) == ("folder", folder)
    compare(problem.error, Problem.LINK_LEADS_OUT, **found)
    assert [str(each) for each in repair(filled).left] == [str(problem)]
    assert re.search(told(Problem.LINK_LEADS_OUT, **found), invoke(app, "repair", filled.url, code=1).output)
    attempts: list[Callable[[], object]] = [
        lambda: filled.put(make_rows(100, filled.info, seed=2)),
        lambda: filled.resolve_quarantine(filled.quarantine_rows()),
        lambda: filled.discard_staging("run"),
        lambda: unpin(filled, "best"),
        lambda: expire(filled, keep_last=1, keep_days=0, grace_days=0),
    ]
    for attempt in attempts:
        try:
            attempt()
        except CorruptFileError as error:
            compare(error, Problem.LINK_LEADS_OUT, **found)
    assert files_below(outside) == before


def test_expire_removes_links_and_nothing_behind_them(filled: FeatureStore, outside: Path) -> None:
    folder = Path(filled.url, "data", "0003")
    for name in ("a.parquet", "b.parquet"):
        (outside / name).write_bytes(b"theirs")
    (folder / "link.parquet").symlink_to(outside / "a.parquet")
    (folder / "gone.parquet").symlink_to(outside / "nowhere")
    (folder / "circle.parquet").symlink_to(folder / "circle.parquet")
    (folder / "folder").symlink_to(outside)
    before = files_below(outside)
    old_s = time.time() - 3 * 86_400
    for path in folder.iterdir():
        os.utime(path, (old_s, old_s), follow_symlinks=False)
    report = expire(filled, keep_last=10, keep_days=10, grace_days=1)
    assert report.num_files == 3 and files_below(outside) == before
    assert {path.name for path in folder.iterdir() if path.is_symlink()} == {"folder"}
    assert verify(filled).problems == []


def test_links_inside_and_a_store_that_is_a_link_are_fine(filled: FeatureStore, tmp_path: Path, outside: Path) -> None:
    held, entry, folder = everything(filled), files_of(filled)[0], Path(filled.url)
    (folder / "more").mkdir()
    shutil.move(folder / entry.path, folder / "more" / "x")
    (folder / entry.path).symlink_to("../../more/x")
    shutil.move(folder, outside / "store")
    folder.symlink_to(outside / "store")
    store = pickle.loads(pickle.dumps(FeatureStore.open(folder)))
    assert everything(store) == held
    put(store, 5, first=9000)
    assert verify(store).problems == []


def test_links_to_nowhere_and_in_circles_are_damage_of_what_is_behind_them(filled: FeatureStore) -> None:
    place = Path(filled.url) / manifest_path(3)
    for target in ("nowhere", place.name):
        place.symlink_to(target)
        with raises(CorruptFileError, Problem.LINK_LEADS_OUT, where=place, link=place):
            filled.snapshot()
        assert [problem.path for problem in verify(filled).problems] == [manifest_path(3)]
        place.unlink()


def test_other_folders_may_have_links_to_files_elsewhere(tmp_path: Path, outside: Path) -> None:
    """Samples and logs are often collected so; a link to a folder is not gone into, as before."""
    (outside / "a.parquet").write_bytes(b"four")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "link.parquet").symlink_to(outside / "a.parquet")
    (tmp_path / "samples" / "folder").symlink_to(outside)
    storage = Storage(tmp_path / "samples")
    (entry,) = storage.entries()
    assert storage.read_bytes("link.parquet") == b"four"
    assert (entry.path, entry.size_bytes) == ("link.parquet", 4)
