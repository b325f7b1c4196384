"""Make the two small files anew without which nothing can be read: store.json, and the newest manifest."""

import time
import uuid

from featurestore import log
from featurestore.commit import writer_name
from featurestore.datafile import info_in, read_verified
from featurestore.errors import CorruptFileError, StorageError
from featurestore.spec import Manifest, StoreInfo, seal
from featurestore.storage import Storage
from featurestore.store import INFO_PATH
from featurestore.upkeep import damage


def rebuild_info(url: str, dry_run: bool) -> str:
    """Write store.json from what stands in a data file of the newest good manifest; the path of that file.

    A damaged one is kept in damaged/. The store keeps its `store_id`; where its data files are too old to know it, it
    gets a new one. Raises CorruptFileError where no file is good.
    """
    storage = Storage(url)
    found = _info_of_a_file(storage, newest_good(storage))
    if found is None:
        raise CorruptFileError(
            f"{storage.full(INFO_PATH)} cannot be rebuilt, as no data file of the newest snapshot is good: put it back"
            " from a backup"
        )
    path, info = found
    if not dry_run:
        damage.keep_copy(storage, INFO_PATH)
        store_id = info.store_id or uuid.uuid4().hex
        storage.write_bytes(INFO_PATH, seal(info.model_copy(update={"store_id": store_id})))
    return path


def newest_good(storage: Storage) -> Manifest:
    """The newest manifest that can be read. Raises CorruptFileError where there is none."""
    for version in reversed(log.versions(storage)):
        try:
            return log.read(storage, version)
        except FileNotFoundError:
            continue
        except (CorruptFileError, StorageError) as error:
            if not damage.is_damage(storage, error):
                raise
    raise CorruptFileError(f"no manifest of {storage.url} is good: put {storage.full(log.LOG)} back from a backup")


def recommit_newest_good(storage: Storage, operation: str, dry_run: bool) -> tuple[int, int]:
    """Commit the newest good manifest again, behind the newest one that is damaged; both versions, old and new.

    Readers and writers, who stop at a damaged newest manifest, go on with it. Where another repair was first, its
    commit stands. Raises CorruptFileError where no manifest is good.
    """
    good, version = newest_good(storage), log.versions(storage)[-1] + 1
    if not dry_run:
        again = good.model_copy(
            update={
                "version": version,
                "parent": good.commit_id,
                "commit_id": uuid.uuid4().hex,
                "writer": writer_name(),
                "time_s": max(time.time(), good.time_s),
                "operation": operation,
            }
        )
        storage.create_exclusive(log.manifest_path(version), seal(again))
        log.read(storage, version)  # ours or another's: whole it must be
    return good.version, version


def _info_of_a_file(storage: Storage, manifest: Manifest) -> tuple[str, StoreInfo] | None:
    for files in manifest.shards.values():
        for entry in files:
            try:
                info = info_in(read_verified(storage, entry.path, "sha256", entry.sha256), storage.full(entry.path))
            except FileNotFoundError:
                continue
            except (CorruptFileError, StorageError) as error:
                if not damage.is_damage(storage, error):
                    raise
                continue
            if info.digest == entry.info_digest:
                return entry.path, info
    return None
