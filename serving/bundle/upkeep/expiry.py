"""Removal of old versions, and of the leftovers of killed exports.

A version's manifest is deleted first, so that nobody can open or choose it any more; then its files. If the process is
killed between the two, the next run removes the files as leftovers. Ages are measured by the storage's own clock.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from featurestore.log import manifest_path, version_of
from featurestore.spec import is_random_id
from featurestore.storage.local import StorageEntry
from featurestore.storage.storage import Storage
from serving.bundle import log
from serving.bundle.manifest import BUNDLES, LOG, USE, BundleManifest
from serving.bundle.upkeep import GRACE_DAYS, KEEP_DAYS, KEEP_LAST

_DAY_S = 86_400.0
LEFTOVER_S = _DAY_S
"""An export that has written nothing for this long counts as dead."""


@dataclass(frozen=True, kw_only=True)
class BundleExpireReport:
    """Results of an expiry, or of its dry run."""

    kept: tuple[int, ...]
    expired: tuple[int, ...]
    paths: tuple[str, ...]
    """Deleted manifests, and folders deleted with all their content."""
    num_files: int
    """Files deleted, leftovers included."""
    num_bytes: int
    num_leftovers: int
    """Folders of killed exports."""


def expire(
    storage: Storage,
    *,
    keep_last: int = KEEP_LAST,
    keep_days: float = KEEP_DAYS,
    grace_days: float = GRACE_DAYS,
    dry_run: bool = False,
) -> BundleExpireReport:
    """Keep the newest versions and those in use, and remove the others.

    Keeps the version in use, the `keep_last` last ones, those published or in use in the last `keep_days`, and those in
    use in the last `grace_days`, as a scorer may not have switched yet.

    The newest version always stays, so that no number is used twice. Leftovers of killed exports are removed after a
    day. Scorers, exports and publishes may run at the same time. Lists all files once. Raises BundleNotFoundError; if a
    manifest or a choice is damaged, raises BrokenBundleError and removes nothing, as any file may be needed.
    """
    for name, value in (("keep_last", keep_last), ("keep_days", keep_days), ("grace_days", grace_days)):
        if not value >= 0:
            raise ValueError(f"{name}={value} is less than 0")
    folders = _folders(storage)  # before the manifests, which then list all that is published from here on
    manifests = {version: log.read_version(storage, version) for version in _known(storage)}
    names = Counter(each.bundle_id for each in manifests.values())
    own = {bundle_id for bundle_id, count in names.items() if count == 1}  # folders named by two manifests stay
    now_s = storage.now()  # writes a file, so only where there is a model
    uses = log.choices(storage)
    wanted = set(list(manifests)[-max(1, keep_last) :])
    for version, times in _times(storage, [each.version for each in uses]).items():
        if now_s - times.used_s < max(keep_days, grace_days) * _DAY_S or now_s - times.made_s < keep_days * _DAY_S:
            wanted.add(version)
    leaving = [version for version in manifests if version not in wanted]
    if not dry_run:
        seen = max((each.choice for each in uses), default=0)
        leaving = [version for version in leaving if _remove(storage, manifests[version], seen, own)]
    dead = _dead(folders, set(names), now_s, LEFTOVER_S)
    if not dry_run:
        _delete(storage, dead)
    doomed = [*(manifests[version].bundle_id for version in leaving if manifests[version].bundle_id in own), *dead]
    gone = [entry for bundle_id in doomed for entry in folders[bundle_id]]
    return BundleExpireReport(
        kept=tuple(version for version in manifests if version not in leaving),
        expired=tuple(leaving),
        paths=(*(manifest_path(version, LOG) for version in leaving), *map(_folder, doomed)),
        num_files=len(gone),
        num_bytes=sum(entry.size_bytes for entry in gone),
        num_leftovers=len(dead),
    )


def remove_leftovers(storage: Storage, grace_s: float = LEFTOVER_S) -> list[str]:
    """Remove the folders of versions that no manifest names, if nothing was written to them for the grace time.
    Returns the names of the folders. Raises BrokenBundleError if a manifest is damaged, as it may name any folder.
    """
    folders = _folders(storage)
    named = {log.read_version(storage, version).bundle_id for version in log.known_versions(storage)}
    if folders.keys() <= named:
        return []
    dead = _dead(folders, named, storage.now(), grace_s)
    _delete(storage, dead)
    return dead


@dataclass
class _Times:
    """When a version was published, and until when it was in use, in seconds since 1970; infinite if it still is."""

    made_s: float = float("-inf")
    used_s: float = float("-inf")


def _times(storage: Storage, chosen: Sequence[int]) -> Mapping[int, _Times]:
    """Return the times of all versions; `chosen`: the version of each choice, oldest first."""
    found: dict[int, _Times] = defaultdict(_Times)
    for version, made_s in _numbers_and_times(storage, LOG):
        found[version].made_s = made_s
    begins_s = [made_s for _, made_s in _numbers_and_times(storage, USE)][: len(chosen)]
    for version, (_, end_s) in zip(chosen, pairwise([*begins_s, float("inf")]), strict=True):
        found[version].used_s = max(found[version].used_s, end_s)
    return found


def _numbers_and_times(storage: Storage, folder: str) -> list[tuple[int, float]]:
    entries = storage.entries(folder, recursive=False)
    found = ((version_of(entry.path.rpartition("/")[2]), entry.mtime_s) for entry in entries)
    return sorted((number, made_s) for number, made_s in found if number is not None)


def _known(storage: Storage) -> list[int]:
    known = log.known_versions(storage)
    if not known:
        log.read_version(storage)  # says what is wrong
    return known


def _remove(storage: Storage, manifest: BundleManifest, seen: int, own: set[str]) -> bool:
    """Remove a version, and its folder if no other version uses it (`own`).

    If it was chosen after choice number `seen`, restores its manifest instead."""
    path = manifest_path(manifest.version, LOG)
    data = storage.read_bytes(path)
    storage.delete(path)
    # `use` checks the manifest again after it has written its choice, so one of the two sees the other.
    if any(each.version == manifest.version for each in log.choices(storage, after=seen)):
        storage.create_or_read(path, data)
        return False
    if manifest.bundle_id in own:
        storage.delete(manifest.folder)
    return True


def _folders(storage: Storage) -> dict[str, list[StorageEntry]]:
    """List the files of all versions by the id of their bundle; ignores all other files."""
    found: dict[str, list[StorageEntry]] = defaultdict(list)
    for entry in storage.entries(BUNDLES):
        _, bundle_id, *below = entry.path.split("/")
        if below and is_random_id(bundle_id):
            found[bundle_id].append(entry)
    return found


def _dead(folders: Mapping[str, list[StorageEntry]], named: set[str], now_s: float, grace_s: float) -> list[str]:
    unnamed = sorted(folders.keys() - named)
    return [each for each in unnamed if now_s - max(entry.mtime_s for entry in folders[each]) > grace_s]


def _delete(storage: Storage, bundle_ids: Sequence[str]) -> None:
    for bundle_id in bundle_ids:
        storage.delete(_folder(bundle_id))


def _folder(bundle_id: str) -> str:
    return f"{BUNDLES}/{bundle_id}"
