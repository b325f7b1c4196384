"""Versions have a limit: what a stray file in log/ may and may not do."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from featurestore import FeatureStore
from featurestore.__main__ import app
from featurestore.errors import CorruptFileError, SnapshotNotFoundError
from featurestore.log import manifest_path, version_of, versions
from featurestore.spec import MAX_VERSION, seal
from featurestore.upkeep.repair import RepairReport, repair
from featurestore.upkeep.verify import verify

IMPOSSIBLE = [
    "99999999999999999999.json",
    "09223372036854775808.json",  # 2**63
    "100000000000000000000.json",  # what a repair once made of the first
    "00000000000000000000.json",
    "3.json",
    "٠٠٠٠٠٠٠٠٠٠٠٠٠٠٠٠٠٠٠٣.json",
    "0000000000000000000a.json",
    "00000000000000000003.json.bak",
]


@pytest.fixture
def filled(store: FeatureStore, make_rows) -> FeatureStore:
    store.put(make_rows(50, store.info))
    store.put(make_rows(20, store.info, seed=1))
    return store


def write(store: FeatureStore, name: str, data: bytes = b"no manifest") -> None:
    (Path(store.url) / "log" / name).write_bytes(data)


def test_the_largest_version_is_the_last_name_that_counts() -> None:
    assert version_of(f"{MAX_VERSION:020d}.json") == MAX_VERSION == 2**63 - 1
    assert [version_of(name) for name in IMPOSSIBLE] == [None] * len(IMPOSSIBLE)


@pytest.mark.long
@pytest.mark.parametrize("name", IMPOSSIBLE)
@pytest.mark.parametrize("good", [False, True])
def test_a_file_with_an_impossible_name_is_seen_by_verify_alone_and_put_aside(
    filled: FeatureStore, make_rows, name: str, good: bool
) -> None:
    data = (Path(filled.url) / manifest_path(2)).read_bytes()
    write(filled, name, data if good else b"no manifest")
    assert filled.snapshot().version == 2 and filled.put(make_rows(5, filled.info, seed=2)).version == 3
    (problem,) = verify(filled).problems
    assert (problem.kind, problem.path) == ("stray", f"log/{name}") and "damaged/" in problem.way_out
    assert repair(filled) == RepairReport(actions=[f"move log/{name} to damaged/"])
    assert filled.storage.list("damaged") == [f"log-{name}"]
    assert verify(filled).problems == [] and versions(filled.storage) == [1, 2, 3]
    assert filled.put(make_rows(5, filled.info, seed=3)).version == 4


def test_names_that_begin_with_a_dot_are_other_programs_business(filled: FeatureStore) -> None:
    write(filled, ".nfs000000000000000012")
    assert verify(filled).problems == []


@pytest.mark.parametrize("version", [4, 9999, 2**40])
def test_numbers_continue_behind_a_stray_manifest(filled: FeatureStore, make_rows, version: int) -> None:
    write(filled, f"{version:020d}.json", (Path(filled.url) / manifest_path(2)).read_bytes())
    with pytest.raises(CorruptFileError, match="is the manifest of version 2"):
        filled.snapshot()
    with pytest.raises(CorruptFileError):  # no commit goes behind it
        filled.put(make_rows(5, filled.info))
    assert versions(filled.storage) == [1, 2, version]
    before = filled.snapshot(2).manifest.shards
    assert repair(filled).version == version + 1
    assert verify(filled).problems == [] and filled.snapshot().manifest.shards == before
    assert filled.put(make_rows(5, filled.info)).version == version + 2


def test_of_several_damaged_manifests_the_newest_good_one_is_committed_again_once(filled: FeatureStore) -> None:
    write(filled, f"{2:020d}.json")
    for version in (9998, 9999):
        write(filled, f"{version:020d}.json")
    planned = repair(filled, dry_run=True)
    report = repair(filled)
    assert report.version == 10_000 and report.actions == planned.actions
    assert versions(filled.storage) == [1, 10_000] and verify(filled).problems == []
    assert filled.snapshot().manifest.shards == filled.snapshot(1).manifest.shards


@pytest.mark.parametrize("version", [3, MAX_VERSION, MAX_VERSION + 1])
def test_a_version_that_cannot_be_is_not_found(filled: FeatureStore, version: int) -> None:
    with pytest.raises(SnapshotNotFoundError, match="the newest is 2"):
        filled.snapshot(version)


def test_the_commands_say_it(filled: FeatureStore) -> None:
    write(filled, "99999999999999999999.json")
    found = CliRunner().invoke(app, ["verify", filled.url])
    assert found.exit_code == 1 and "99999999999999999999.json has a name that no manifest can have" in found.output
    mended = CliRunner().invoke(app, ["repair", filled.url])
    assert mended.exit_code == 0 and "move log/99999999999999999999.json to damaged/" in mended.output
    assert CliRunner().invoke(app, ["verify", filled.url]).exit_code == 0


def test_a_manifest_whose_counts_are_wrong_is_not_committed_again(filled: FeatureStore) -> None:
    """Sealed well, so that readers take it; what it names is right, what it counts is not."""
    manifest = filled.snapshot().manifest
    write(filled, f"{2:020d}.json", seal(manifest.model_copy(update={"num_files": manifest.num_files + 1})))
    assert [problem.kind for problem in verify(filled).problems] == ["manifest"]
    assert repair(filled).version == 3
    assert verify(filled).problems == [] and versions(filled.storage) == [1, 3]
