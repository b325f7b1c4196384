"""Old versions go, and nothing that anybody may still need; two of them meet in a race, and one sees the other."""

import os
import shutil
import time
from pathlib import Path

import pytest

from featurestore.problems import Problem as StoreProblem
from featurestore.storage.storage import Storage
from serving.__main__ import app
from serving.bundle import log
from serving.bundle.log import BundleExpireReport, expire, remove_leftovers
from serving.bundle.manifest import BUNDLES
from serving.bundle.open import Bundle
from serving.errors import BrokenBundleError, BundleNotFoundError
from serving.problems import Problem
from tests.cli import invoke
from tests.raised import raises
from tests.serving.bundle.conftest import forge, versions_there, with_versions
from tests.serving.scoring.variants import Exported, Variants

DAY_S = 24 * 3600


class Versions:
    """A model with four versions; each is used, in their order, and all of it is 100 days old."""

    def __init__(self, made: Exported, folder: Path) -> None:
        self.folder = folder / "model"
        shutil.copytree(with_versions(made, 4), self.folder)
        self.storage = Storage(self.folder)
        self.manifests = [log.read_version(self.storage, version) for version in range(1, 5)]
        self.age(self.folder, 100)

    def age(self, place: Path, days: float) -> None:
        """Make a file, or all of a folder, so old."""
        then = time.time() - days * DAY_S
        for path in [place, *place.rglob("*")]:
            os.utime(path, (then, then))

    def use(self, version: int, days_ago: float) -> None:
        """Choose a version, as if some days ago."""
        choice = log.use(self.storage, version)
        self.age(self.folder / "use" / f"{choice.choice:020}.json", days_ago)

    def expire(self, storage: Storage | None = None, **options: float) -> BundleExpireReport:
        return expire(storage or self.storage, **{"keep_last": 1, "keep_days": 0, "grace_days": 1, **options})  # type: ignore[arg-type]

    @property
    def there(self) -> list[int]:
        return versions_there(self.folder)


@pytest.fixture
def versions(exported: Variants, tmp_path: Path) -> Versions:
    return Versions(exported("plain"), tmp_path)


def test_old_versions_go_with_their_files(versions: Versions, tmp_path: Path) -> None:
    folders = [versions.folder / manifest.folder for manifest in versions.manifests[:2]]
    sizes = [path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()]
    versions.use(3, 50)
    report = versions.expire()
    assert (report.kept, report.expired, report.num_leftovers) == ((3, 4), (1, 2), 0)
    assert report.num_bytes == sum(sizes)
    assert versions.there == [3, 4]
    bundle = Bundle.open(str(versions.folder), cache_dir=tmp_path / "cache")
    assert bundle.manifest.version == 3
    bundle.close()
    assert versions.expire().expired == ()
    with raises(BundleNotFoundError, Problem.NO_VERSION, where=versions.folder, version=2, known="versions 3, 4"):
        log.use(versions.storage, 2)


@pytest.mark.parametrize(
    ("used", "aged", "options", "expired"),
    [
        ({}, {}, {"keep_last": 3}, (1,)),
        # The newest stays although nobody uses it: the next export gets a number that was never given.
        ({2: 50}, {}, {"keep_last": 0, "grace_days": 0}, (1, 3)),
        # For scorers that have not switched from it yet.
        ({2: 60, 4: 0.5}, {}, {"grace_days": 1}, (1, 3)),
        ({2: 60, 4: 0.5}, {}, {"grace_days": 0.4}, (1, 2, 3)),
        ({2: 60, 4: 20}, {1: 10}, {"keep_days": 30}, (3,)),
        ({2: 60, 4: 20}, {1: 10}, {"keep_days": 15}, (2, 3)),
    ],
)
def test_the_last_ones_and_those_of_the_last_days_stay(
    versions: Versions, used: dict[int, float], aged: dict[int, float], options: dict[str, float], expired: tuple
) -> None:
    for version, days_ago in used.items():
        versions.use(version, days_ago)
    for version, days in aged.items():
        versions.age(versions.folder / "log" / f"{version:020}.json", days)
    assert versions.expire(**options).expired == expired
    assert versions.there == [version for version in (1, 2, 3, 4) if version not in expired]


@pytest.mark.parametrize(("name", "value"), [("keep_last", -1), ("keep_days", float("nan")), ("grace_days", -0.5)])
def test_less_than_nothing_is_not_kept(versions: Versions, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        versions.expire(**{name: value})
    assert versions.expire(keep_last=4).expired == ()


def test_what_killed_exports_left_goes_after_a_day_and_what_others_put_there_stays(versions: Versions) -> None:
    bundles = versions.folder / BUNDLES
    for name, days in (("d" * 32, 2.0), ("e" * 32, 0.5), ("notes", 100)):
        (bundles / name).mkdir()
        (bundles / name / "network.pt2").write_bytes(b"123")
        versions.age(bundles / name, days)
    report = versions.expire(keep_last=4, grace_days=0)
    assert (report.expired, report.num_leftovers, report.num_bytes) == ((), 1, 3)
    kept = {manifest.bundle_id for manifest in versions.manifests}
    assert {path.name for path in bundles.iterdir()} - kept == {"e" * 32, "notes"}


@pytest.mark.parametrize(
    "bundle_id", ["../../victim", "../victim", "", ".", "..", "/", "a" * 32 + "/../../victim", "A" * 32]
)
def test_a_forged_id_removes_nothing(versions: Versions, bundle_id: str) -> None:
    victim = versions.folder.parent / "victim" / "file"
    victim.parent.mkdir()
    victim.write_bytes(b"1")
    forge(versions.folder, 1, bundle_id=bundle_id)
    before = sorted(versions.folder.rglob("*"))
    words = ["expire", str(versions.folder), "--keep-last", "1", "--keep-days", "0", "--grace-days", "0"]
    for more in (["--dry-run"], []):
        done = invoke(app, *words, *more)
        assert (done.exit_code, done.stdout) == (1, "") and "bundle_id" in done.stderr
    assert victim.read_bytes() == b"1" and sorted(versions.folder.rglob("*")) == before


def test_the_folder_of_a_version_that_stays_is_not_removed_for_another(versions: Versions) -> None:
    forge(versions.folder, 1, bundle_id=versions.manifests[3].bundle_id)
    report = versions.expire()
    assert report.expired == (1, 2, 3) and f"{BUNDLES}/{versions.manifests[3].bundle_id}" not in report.folders
    assert versions.there == [4]


def test_nothing_goes_where_a_manifest_is_damaged(versions: Versions) -> None:
    """No version, and no leftovers, which the manifest may name."""
    dead = versions.folder / BUNDLES / ("d" * 32) / "ids-12.bin"
    dead.parent.mkdir()
    dead.write_bytes(b"half")
    path = versions.folder / "log" / f"{3:020}.json"
    path.write_bytes(path.read_bytes()[:-1])
    for remove in (versions.expire, lambda: remove_leftovers(versions.storage, grace_s=-1)):
        with raises(BrokenBundleError, StoreProblem.DAMAGED, where=path):
            remove()
    assert len(list((versions.folder / BUNDLES).iterdir())) == 5


def test_a_choice_of_what_has_just_gone_is_undone(versions: Versions, monkeypatch: pytest.MonkeyPatch) -> None:
    """The expiry has looked for choices for the last time when `use` writes its own."""
    real = log.read_version

    def overtaken(storage: Storage, version: int | None = None) -> object:
        found = real(storage, version)
        monkeypatch.setattr(log, "read_version", real)
        versions.expire()
        return found

    monkeypatch.setattr(log, "read_version", overtaken)
    with raises(BundleNotFoundError, Problem.BEING_REMOVED, where=versions.folder, version=1):
        log.use(versions.storage, 1)
    assert log.version_in_use(versions.storage) == 4


def test_a_version_that_is_chosen_meanwhile_stays(versions: Versions, monkeypatch: pytest.MonkeyPatch) -> None:
    """`use` has written its choice, and looks whether the version is there, when its manifest has just gone."""
    real, report = log.known_versions, list[BundleExpireReport]()

    def known(storage: Storage) -> list[int]:
        if log.version_in_use(storage) == 1:  # the choice was written
            monkeypatch.setattr(log, "known_versions", real)
            report.append(versions.expire())
        return real(storage)

    monkeypatch.setattr(log, "known_versions", known)
    log.use(versions.storage, 1)
    assert report[0].expired == (2, 3)
    assert log.version_in_use(versions.storage) == 1
    assert versions.there == [1, 4]


def test_what_is_chosen_while_it_is_marked_never_goes(versions: Versions, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is made and acknowledged just before the mark: killed at any moment, the expiry has taken nothing."""
    real, deleted = Storage.write_bytes, Storage.delete

    def chosen_before(self: Storage, path: str, data: bytes) -> None:
        if path.startswith("leaving/1-"):
            log.use(self, 1)
        real(self, path, data)

    def delete(self: Storage, path: str) -> None:
        assert path != f"log/{1:020}.json"
        deleted(self, path)

    monkeypatch.setattr(Storage, "write_bytes", chosen_before)
    monkeypatch.setattr(Storage, "delete", delete)
    assert versions.expire().expired == (2, 3)
    assert log.version_in_use(versions.storage) == 1 and versions.there == [1, 4]


def test_what_a_killed_expiry_marked_is_refused_for_a_day(versions: Versions, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Storage, path: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Storage, "delete", killed)
        versions.expire()
    assert versions.there == [1, 2, 3, 4]
    with raises(BundleNotFoundError, Problem.BEING_REMOVED, where=versions.folder, version=1):
        log.use(versions.storage, 1)
    assert log.version_in_use(versions.storage) == 4, "the choice is undone"
    versions.expire(keep_last=4)
    assert len(list((versions.folder / "leaving").iterdir())) == 1
    versions.age(versions.folder / "leaving", 1.1)
    versions.expire(keep_last=4)
    log.use(versions.storage, 1)
    assert log.version_in_use(versions.storage) == 1


def test_the_command_says_what_it_did(versions: Versions) -> None:
    words = ["expire", str(versions.folder), "--keep-last", "1", "--keep-days", "0"]
    done = invoke(app, *words, "--dry-run", code=0)
    assert versions.there == [1, 2, 3, 4]
    assert done.stdout.startswith("would keep 1 version: 4\nwould remove 3 versions: 1 to 3\nwould delete ")
    named = [line.strip() for line in done.stdout.splitlines()[3:]]
    before = {str(path.relative_to(versions.folder)) for path in versions.folder.rglob("*") if path.is_file()}
    assert invoke(app, *words).stdout.startswith("kept 1 version: 4\nremoved 3 versions: 1 to 3\ndeleted ")
    gone = {path for path in before if not (versions.folder / path).exists()}
    manifests = {f"log/{version:020}.json" for version in (1, 2, 3)}
    assert gone == manifests | {path for path in before for each in named if path.startswith(f"{each}/")}
    assert versions.there == [4]
