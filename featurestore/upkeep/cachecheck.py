"""Check of a cache folder: is every file what the run that built it has written? The `verify` of readers."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import xxhash
from pydantic import ValidationError

from featurestore.errors import StorageError
from featurestore.lookup.cache import SEAL, STEM_DIGITS, SUFFIXES, CacheSeal, digest_of_file
from featurestore.storage.private import check_owner, is_private
from featurestore.storage.threads import Progress

_KEYS, _ROWS, _ = SUFFIXES


@dataclass
class CacheReport:
    """Counts of what was checked, and a line for each shard that is not what was built, with the way out."""

    num_shards: int = 0
    num_bytes: int = 0
    num_other: int = 0  # shards of another version of this program, which nothing opens any more
    problems: list[str] = field(default_factory=list)


def verify_cache(folder: Path, progress: Progress | None = None) -> CacheReport:
    """Read every file of a cache folder, and compare it with its seal, and the seal with its own name.

    Changes nothing. Files that a run removes meanwhile are no problem. Raises StorageError where the folder is not
    there, is another user's, or cannot be read.
    """
    report = CacheReport()
    try:
        check_owner(folder)
        seals = sorted(path for path in folder.iterdir() if path.name.startswith("shard-") and path.suffix == SEAL)
        for done, path in enumerate(seals, start=1):
            _check(path, report)
            if progress is not None:
                progress(done, len(seals))
    except OSError as error:
        raise StorageError(f"cannot read the cache folder {folder}: {error}") from error
    return report


def _check(path: Path, report: CacheReport) -> None:
    stem = path.name.removesuffix(SEAL)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    try:
        seal = CacheSeal.model_validate_json(data)
    except ValidationError:
        if _is_of_another_version(data):
            report.num_other += 1
            return
        wrong = "its seal cannot be read"
    else:
        wrong = _wrong(path.parent, stem, seal, report)
    report.num_shards += 1
    if wrong and path.exists():
        way_out = f"the next run builds it anew, also after rm {path.parent}/{stem}.*"
        report.problems.append(f"{path.parent / stem}: {wrong}; {way_out}")


def _wrong(folder: Path, stem: str, seal: CacheSeal, report: CacheReport) -> str:
    """Say what is wrong with the files of a seal; empty where nothing is."""
    keys, rows = folder / f"{stem}{_KEYS}", folder / f"{stem}{_ROWS}"
    if stem.rpartition("-")[2] != seal.made_from[:STEM_DIGITS]:
        return "its seal is that of another"
    for path in (keys, rows, folder / f"{stem}{SEAL}"):
        if not path.exists():
            return f"{path.name} is missing"
        if not is_private(path.lstat()):
            return f"{path.name} is no regular file of this user's, or others may write to it"
    report.num_bytes += keys.stat().st_size + rows.stat().st_size
    if xxhash.xxh3_128_hexdigest(keys.read_bytes()) != seal.keys_xxh3_128:
        return f"{keys.name} is not what was built"
    if rows.stat().st_size != seal.num_rows * seal.row_bytes or digest_of_file(rows) != seal.rows_xxh3_128:
        return f"{rows.name} is not what was built"
    return ""


def _is_of_another_version(data: bytes) -> bool:
    try:
        fields = json.loads(data)
    except ValueError:
        return False
    return isinstance(fields, dict) and "rows_xxh3_128" in fields and "made_from" not in fields
