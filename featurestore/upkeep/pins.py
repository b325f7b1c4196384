"""Pins: names that keep a snapshot, whatever the policy of `expire` says."""

import re
import time
from typing import Annotated

from pydantic import Field

from featurestore import log as manifests
from featurestore.errors import CorruptFileError, PinError, SnapshotNotFoundError
from featurestore.published.channels import VersionName, read_channels
from featurestore.spec import LAST_SECOND, Sealed, Version, create_sealed, read_sealed
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore

PINS = manifests.PINS
_SUFFIX = ".json"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
PIN_NAME_RULE = "{name!r} is no name of a pin: letters, digits, '.', '_' and '-', up to 100, no leading '.'"


class Pin(Sealed):
    """One name, and the snapshot that it keeps."""

    name: str
    version: Version
    writer: str
    time_s: Annotated[float, Field(ge=0, le=LAST_SECOND)]  # for people


def is_pin_name(name: str) -> bool:
    """Return whether a pin may have this name."""
    return _NAME.fullmatch(name) is not None


def pin(store: FeatureStore, name: str, version: VersionName | None = None) -> Pin:
    """Keep a snapshot, the newest by default, until `unpin`. To make the same pin again is no error.

    Raises PinError where the name keeps another snapshot, SnapshotNotFoundError where `expire` was first.
    """
    path, storage = _path(name), store.storage
    wanted = store.snapshot(version).version
    if wanted == 0:
        raise SnapshotNotFoundError(f"{store.url} has no commit that could be pinned; 0 is the empty store")
    mine = Pin(name=name, version=wanted, writer=manifests.writer_name(), time_s=time.time())
    kept = create_sealed(storage, path, mine)
    if kept.version != wanted:
        raise PinError(f"{name!r} keeps snapshot {kept.version} already: unpin it first, or take another name")
    # `expire` puts a copy aside before it looks at the pins for the last time: one of the two sees the other.
    if not _is_there(storage, manifests.manifest_path(wanted)) or _is_there(
        storage, manifests.manifest_path(wanted, manifests.EXPIRED)
    ):
        if kept == mine:
            storage.delete(path)
        raise SnapshotNotFoundError(f"snapshot {wanted} of {store.url} is expiring just now: pin a newer one")
    return kept


def unpin(store: FeatureStore, name: str) -> None:
    """Remove a pin, damaged ones too. Raises PinError where there is none."""
    path = _path(name)
    if not _is_there(store.storage, path):
        names = [found.removesuffix(_SUFFIX) for found in store.storage.list(PINS)]
        raise PinError(f"{store.url} has no pin {name!r}; it has {', '.join(names) or 'none'}")
    store.storage.delete(path)


def read_pins(storage: Storage) -> list[Pin]:
    """Read all pins, by name. Raises CorruptFileError: what a damaged one keeps is not known."""
    found = []
    for name in storage.list(PINS):
        pin_name = name.removesuffix(_SUFFIX)
        try:
            found.append(read_pin(storage, pin_name))
        except FileNotFoundError:
            continue  # unpinned meanwhile
        except CorruptFileError as error:
            way_out = f"python -m featurestore unpin {storage.url} {pin_name}, and pin the snapshot again"
            raise CorruptFileError(f"{error}: {way_out}") from error
    return found


def kept_versions(storage: Storage) -> set[int]:
    """Return the snapshots that a pin or a channel keeps. Raises CorruptFileError.

    Pins are read first: who moves a channel pins its snapshot until the channel points there.
    """
    pinned = {pin.version for pin in read_pins(storage)}
    return pinned | {move.version for move in read_channels(storage) if move.version is not None}


def read_pin(storage: Storage, name: str) -> Pin:
    """Read one pin. Raises FileNotFoundError, CorruptFileError."""
    path = f"{PINS}/{name}{_SUFFIX}"
    found = read_sealed(storage, path, Pin)
    if found.name != name:
        raise CorruptFileError(f"{storage.full(path)} is the pin {found.name!r}")
    return found


def _path(name: str) -> str:
    if not is_pin_name(name):
        raise PinError(PIN_NAME_RULE.format(name=name))
    return f"{PINS}/{name}{_SUFFIX}"


def _is_there(storage: Storage, path: str) -> bool:
    try:
        storage.entry(path)
    except FileNotFoundError:
        return False
    except CorruptFileError:  # a link out of the store
        return True
    return True
