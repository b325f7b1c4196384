"""The log of a bundle's versions and of the choices among them: numbered files, each written once."""

import time
import uuid
from collections.abc import Callable

from featurestore.errors import CorruptFileError
from featurestore.log import manifest_path, versions, writer_name
from featurestore.published.versions import SealedT, append_numbered
from featurestore.spec import read_sealed
from featurestore.storage.storage import Storage
from featurestore.store import INFO_PATH
from serving.bundle import MODELS
from serving.bundle.manifest import BUNDLES, LOG, USE, BundleManifest, Choice
from serving.errors import BrokenBundleError, BundleNotFoundError


def refuse_store(storage: Storage) -> None:
    """Raise BundleNotFoundError for the address of a feature store, which has a log of the same form."""
    if INFO_PATH in storage.list():
        raise BundleNotFoundError(f"{storage.url} is a feature store, not a model: name a model's folder")


def refuse_others(storage: Storage) -> None:
    """Raise BundleNotFoundError for a folder with files that do not belong to a model."""
    refuse_store(storage)
    names = storage.list()
    if names and not {BUNDLES, LOG}.intersection(names):
        raise BundleNotFoundError(
            f"{storage.url} has files that do not belong to a model ({names[0]}): name a new or empty folder"
        )


def publish(storage: Storage, manifest_of: Callable[[int], BundleManifest]) -> BundleManifest:
    """Publish a manifest as the next version, with the next free number.

    Raises StorageError, CommitConflictError.
    """
    return append_numbered(storage, LOG, manifest_of)


def use(storage: Storage, version: int) -> Choice:
    """Choose the version that is served from now on. Raises BundleNotFoundError, BrokenBundleError."""
    read_version(storage, version)
    choice = _choose(storage, version)
    if version not in known_versions(storage):  # an expiry that ran meanwhile may not have seen the choice
        if others := [each.version for each in choices(storage) if each.choice != choice.choice]:
            _choose(storage, others[-1])
        raise BundleNotFoundError(f"version {version} of {storage.url} was removed by an expiry at this moment")
    return choice


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
            raise BundleNotFoundError(
                f"{storage.url} is a run, not a published model; publish it with: python jobs/export_model.py --run "
                f"{storage.url} --out {MODELS}"
            )
        raise BundleNotFoundError(
            f"{storage.url} has no published model; make one with: python jobs/export_model.py --run RUN --out "
            f"{storage.url}"
        )
    if version is None and (version := version_in_use(storage)) is None:
        refuse_store(storage)
        raise BundleNotFoundError(
            f"no version of {storage.url} is in use; it has {_shown(known)}: choose one with python -m serving use "
            f"{storage.url} VERSION"
        )
    if version not in known:
        raise BundleNotFoundError(f"{storage.url} has no version {version}; it has {_shown(known)}")
    manifest = _read(storage, LOG, version, BundleManifest)
    if manifest.version != version:
        raise BrokenBundleError(
            f"{storage.full(manifest_path(version, LOG))} is the manifest of version {manifest.version}"
        )
    return manifest


def _choose(storage: Storage, version: int) -> Choice:
    writer, nonce, now_s = writer_name(), uuid.uuid4().hex, time.time()
    return append_numbered(
        storage,
        USE,
        lambda number: Choice(choice=number, version=version, time_s=now_s, writer=writer, nonce=nonce),
    )


def _read(storage: Storage, folder: str, number: int, model_class: type[SealedT]) -> SealedT:
    path = manifest_path(number, folder)
    try:
        return read_sealed(storage, path, model_class)
    except FileNotFoundError as error:
        raise BrokenBundleError(f"{storage.full(path)} is missing") from error
    except CorruptFileError as error:
        refuse_store(storage)
        raise BrokenBundleError(str(error)) from error


def _shown(known: list[int]) -> str:
    """Format the last versions, e.g. `versions 7, 8, 9`."""
    return f"version{'s' if len(known) > 1 else ''} {', '.join(map(str, known[-10:]))}"
