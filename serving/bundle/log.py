"""The log of a bundle's versions and of the choices among them: numbered files, each written once; lists; expiry.

An expiry marks a version as leaving, so that nobody can choose it any more; then it deletes the manifest, and then the
files. If the process is killed between the two, the next run removes the files as leftovers. Ages are measured by the
storage's own clock.
"""

import contextlib
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from featurestore.errors import CorruptFileError
from featurestore.log import manifest_path, versions, versions_and_times, writer_name
from featurestore.published.versions import SealedT, append_numbered
from featurestore.spec import is_random_id, read_sealed
from featurestore.storage.local import StorageEntry
from featurestore.storage.storage import Storage
from featurestore.store import INFO_PATH
from serving.bundle import GRACE_DAYS, KEEP_DAYS, KEEP_LAST, MODELS
from serving.bundle.files import open_vectors
from serving.bundle.manifest import BUNDLES, LEAVING, LOG, USE, BundleManifest, Choice
from serving.errors import BrokenBundleError, BundleNotFoundError
from serving.problems import Problem


def refuse_store(storage: Storage) -> None:
    """Raise BundleNotFoundError for the address of a feature store, which has a log of the same form."""
    if INFO_PATH in storage.list():
        raise BundleNotFoundError(Problem.IS_STORE, storage.url)


def refuse_others(storage: Storage) -> None:
    """Raise BundleNotFoundError for a folder with files that do not belong to a model."""
    refuse_store(storage)
    names = storage.list()
    if names and not {BUNDLES, LOG}.intersection(names):
        raise BundleNotFoundError(Problem.OTHER_FILES, storage.url, names[0])


def use(storage: Storage, version: int) -> Choice:
    """Choose the version that is served from now on. Raises BundleNotFoundError, BrokenBundleError."""
    read_version(storage, version)
    choice = _choose(storage, version)
    if _is_leaving(storage, version) or version not in known_versions(storage):  # it may not have seen the choice
        if others := [each.version for each in choices(storage) if each.choice != choice.choice]:
            _choose(storage, others[-1])
        raise BundleNotFoundError(Problem.BEING_REMOVED, version, storage.url)
    return choice


def publish(storage: Storage, draft: BundleManifest) -> BundleManifest:
    """Publish a version, whose files are there, under the next number. Raises CommitConflictError, StorageError."""
    return append_numbered(storage, LOG, lambda n: draft.model_copy(update={"version": n}), names_files=True)


def known_versions(storage: Storage) -> list[int]:
    """List the published versions, ascending."""
    return versions(storage, LOG)


def version_in_use(storage: Storage) -> int | None:
    """Return the version that was chosen last, or None. Raises BrokenBundleError."""
    choices = versions(storage, USE)
    return _read(storage, USE, choices[-1], Choice).version if choices else None


def choices(storage: Storage, after: int = 0) -> list[Choice]:
    """Read the choices with a higher number than `after`, oldest first; by default all. Raises BrokenBundleError."""
    return [_read(storage, USE, number, Choice) for number in versions(storage, USE) if number > after]


def read_version(storage: Storage, version: int | None = None) -> BundleManifest:
    """Read the manifest of a version, by default of the one in use. Raises BundleNotFoundError, BrokenBundleError."""
    known = known_versions(storage)
    if not known:
        if storage.list("checkpoints"):
            raise BundleNotFoundError(Problem.IS_RUN, storage.url, MODELS)
        raise BundleNotFoundError(Problem.NO_MODEL, storage.url)
    if version is None and (version := version_in_use(storage)) is None:
        refuse_store(storage)
        raise BundleNotFoundError(Problem.NO_CHOICE, storage.url, _shown(known))
    if version not in known:
        raise BundleNotFoundError(Problem.NO_VERSION, storage.url, version, _shown(known))
    manifest = _read(storage, LOG, version, BundleManifest)
    if manifest.version != version:
        raise BrokenBundleError(Problem.OTHER_MANIFEST, storage.full(manifest_path(version, LOG)), manifest.version)
    return manifest


@dataclass(frozen=True)
class BundleIdentity:
    """A bundle's version, and the snapshot of each vectors store by the name of its feature store."""

    version: int
    vectors: Mapping[str, int]

    def __str__(self) -> str:
        """Describe it for the log, e.g. `version 3 (vectors: images 17)`."""
        stores = ", ".join(f"{store} {snapshot}" for store, snapshot in self.vectors.items())
        return f"version {self.version}" + (f" (vectors: {stores})" if stores else "")

    @classmethod
    def newest(cls, url: str) -> "BundleIdentity":
        """Look up the version in use of the bundle at `url`, and its newest vectors; a few small reads.

        Raises BundleNotFoundError, BrokenBundleError, StorageError."""
        storage = Storage(url)
        manifest = read_version(storage)
        vectors = {of.store: open_vectors(storage, manifest, of).snapshot.version for of in manifest.vectors}
        return cls(manifest.version, vectors)


def _choose(storage: Storage, version: int) -> Choice:
    writer, nonce, now_s = writer_name(), uuid.uuid4().hex, time.time()
    return append_numbered(
        storage, USE, lambda n: Choice(choice=n, version=version, time_s=now_s, writer=writer, nonce=nonce)
    )


def _read(storage: Storage, folder: str, number: int, model_class: type[SealedT]) -> SealedT:
    path = manifest_path(number, folder)
    try:
        return read_sealed(storage, path, model_class)
    except FileNotFoundError as error:
        raise BrokenBundleError(Problem.MISSING, storage.full(path)) from error
    except CorruptFileError as error:
        refuse_store(storage)
        raise BrokenBundleError(*error.args) from error


def _shown(known: list[int]) -> str:
    """Format the last versions, e.g. `versions 7, 8, 9`."""
    return f"version{'s' if len(known) > 1 else ''} {', '.join(map(str, known[-10:]))}"


@dataclass(frozen=True)
class ListedVersion:
    """A version of a model; `manifest` is None if it is damaged."""

    version: int
    manifest: BundleManifest | None
    in_use: bool
    chosen_s: tuple[float, ...]
    """When it was put in use, in seconds since 1970."""


def list_versions(storage: Storage, last: int | None = None) -> list[ListedVersion]:
    """List the last published versions, by default all, newest first.

    Raises BundleNotFoundError if there is none, and BrokenBundleError if a choice is damaged.
    """
    known = known_versions(storage)
    if not known:
        read_version(storage)  # says what is wrong
    in_use, chosen, found = version_in_use(storage), choices(storage), list[ListedVersion]()
    for version in known[::-1][:last]:
        manifest = None
        with contextlib.suppress(BrokenBundleError):
            manifest = read_version(storage, version)
        chosen_s = tuple(each.time_s for each in chosen if each.version == version)
        found.append(ListedVersion(version, manifest, version == in_use, chosen_s))
    return found


_DAY_S = 86_400.0
LEFTOVER_S = _DAY_S
"""An export that has written nothing for this long counts as dead."""


@dataclass(frozen=True, kw_only=True)
class BundleExpireReport:
    """Results of an expiry, or of its dry run."""

    kept: tuple[int, ...]
    expired: tuple[int, ...]
    folders: tuple[str, ...]
    """Folders deleted with all their content: of expired versions, then of killed exports."""
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
    known = known_versions(storage)
    if not known:
        read_version(storage)  # says what is wrong
    manifests = {version: read_version(storage, version) for version in known}
    names = Counter(each.bundle_id for each in manifests.values())
    own = {bundle_id for bundle_id, count in names.items() if count == 1}  # folders named by two manifests stay
    now_s = storage.now()  # writes a file, so only where there is a model
    uses = choices(storage)
    wanted = set(list(manifests)[-max(1, keep_last) :])
    made = versions_and_times(storage.entries(LOG, recursive=False))
    wanted |= {version for version, made_s in made if now_s - made_s < keep_days * _DAY_S}
    begins_s = [made_s for _, made_s in versions_and_times(storage.entries(USE, recursive=False))][: len(uses)]
    for choice, end_s in zip(uses, [*begins_s, float("inf")][1:], strict=True):  # the last one still holds
        if now_s - end_s < max(keep_days, grace_days) * _DAY_S:
            wanted.add(choice.version)
    leaving = [version for version in manifests if version not in wanted]
    if not dry_run:
        seen = max((each.choice for each in uses), default=0)
        leaving = [version for version in leaving if _remove(storage, manifests[version], seen, own)]
    dead = _dead(folders, set(names), now_s, LEFTOVER_S)
    if not dry_run:
        for bundle_id in dead:
            storage.delete(f"{BUNDLES}/{bundle_id}")
        marks = storage.entries(LEAVING, recursive=False)
        storage.delete_files(mark.path for mark in marks if now_s - mark.mtime_s > LEFTOVER_S)
    doomed = [*(manifests[version].bundle_id for version in leaving if manifests[version].bundle_id in own), *dead]
    return BundleExpireReport(
        kept=tuple(version for version in manifests if version not in leaving),
        expired=tuple(leaving),
        folders=tuple(f"{BUNDLES}/{bundle_id}" for bundle_id in doomed),
        num_bytes=sum(entry.size_bytes for bundle_id in doomed for entry in folders[bundle_id]),
        num_leftovers=len(dead),
    )


def remove_leftovers(storage: Storage, grace_s: float = LEFTOVER_S) -> list[str]:
    """Remove the folders of versions that no manifest names, if nothing was written to them for the grace time.
    Returns the names of the folders. Raises BrokenBundleError if a manifest is damaged, as it may name any folder.
    """
    folders = _folders(storage)
    named = {read_version(storage, version).bundle_id for version in known_versions(storage)}
    if folders.keys() <= named:
        return []
    dead = _dead(folders, named, storage.now(), grace_s)
    for bundle_id in dead:
        storage.delete(f"{BUNDLES}/{bundle_id}")
    return dead


def _remove(storage: Storage, manifest: BundleManifest, seen: int, own: set[str]) -> bool:
    """Remove a version, and its folder if no other version uses it (`own`), unless it was chosen after `seen`."""
    mark = f"{LEAVING}/{manifest.version}-{uuid.uuid4().hex}"
    storage.write_bytes(mark, b"")
    # `use` looks for marks after it has written its choice, so one of the two sees the other.
    is_chosen = any(each.version == manifest.version for each in choices(storage, after=seen))
    if not is_chosen:
        storage.delete(manifest_path(manifest.version, LOG))
        if manifest.bundle_id in own:
            storage.delete(manifest.folder)
    storage.delete(mark)
    return not is_chosen


def _is_leaving(storage: Storage, version: int) -> bool:
    """Return whether an expiry is about to remove a version, or was killed there within the last day."""
    return any(mark.partition("-")[0] == str(version) for mark in storage.list(LEAVING))


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
