"""Image sources: files of a folder or of an object store, listed and read.

Links are followed, but each folder is listed once: links in a circle end, and a folder that several links lead to has
its files under one name. Pipes, sockets and devices are no images: opening one could wait for ever.
"""

import contextlib
import functools
import io
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any, NamedTuple, cast
from urllib.parse import quote_from_bytes

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem
from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.local import LocalFileSystem
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_exponential

from featurestore.errors import PasswordError
from featurestore.keys import key_of_bytes, key_of_uri
from featurestore.storage import local
from featurestore.storage.remote import HDFS, check_endpoint, check_password, hdfs, reading_options
from featurestore.text import CsvTextError, long_rows, without_passwords
from pipeline.errors import BadImageError, SourceError, SourceNotFoundError
from pipeline.images.imagetable import BATCH_ROWS, ImageRef, ImageTable, Listing

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
TABLE_EXTENSIONS = (".parquet", ".csv")
STAT_THREADS = 32  # waiting for answers, not computing
S3_PROTOCOLS = ("s3", "s3a")


def list_images(address: str) -> Listing:
    """List the images of a folder, of an fsspec address, or of a table (.parquet, .csv).

    In a folder the uri is the path relative to it, with forward slashes, and the key that of the uri. A table has a
    column `uri` (relative to the table's folder, or a whole address) and `key` (int64), or `id` (string, made into a
    key), or neither (the key is that of the uri). Raises SourceError, KeyCollisionError.
    """
    with _source_errors(f"look at {address}"):
        fs, root = _open_fs(address)
        if isinstance(fs, LocalFileSystem):
            check_reachable(root)
        is_file = fs.isfile(root)
        is_folder = not is_file and (_is_s3_folder(fs, root) if fs.protocol == S3_PROTOCOLS else fs.isdir(root))
    if is_file and root.lower().endswith(TABLE_EXTENSIONS):
        return _list_table(fs, root, address)
    if is_file:
        raise SourceNotFoundError(
            f"{address} is a file: give a folder of images, or a table ({', '.join(TABLE_EXTENSIONS)})"
        )
    if not is_folder:
        raise SourceNotFoundError(f"there is no folder {address}: give the folder (or table) of your images")
    return _list_folder(fs, root, address)


def bytes_of(ref: ImageRef) -> bytes:
    """Read the bytes of a listed image. Raises BadImageError with the reason."""
    if ref.problem:
        raise BadImageError(ref.problem)
    return read_image(ref.location)


def read_image(location: str, most_bytes: int | None = None) -> bytes:
    """Read the bytes of one image, or its first `most_bytes` where it has more.

    Other errors than a missing or forbidden file are tried three times. Raises BadImageError with the reason.
    """
    try:
        return _read(location, most_bytes)
    except BadImageError:
        raise
    except FileNotFoundError as error:
        raise BadImageError("no such file") from error
    except Exception as error:  # each object store's client has its own tree of errors
        raise BadImageError(f"cannot be read: {_reason(error)}") from error


@contextlib.contextmanager
def _source_errors(action: str) -> Iterator[None]:
    try:
        yield
    except PasswordError:
        raise
    except Exception as error:  # each object store's client has its own tree of errors
        raise SourceError(f"cannot {action}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return without_passwords(str(error)) or type(error).__name__


def _is_passing(error: BaseException) -> bool:
    lasting = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, OSError) and not isinstance(error, lasting)


@retry(
    retry=retry_if_exception(_is_passing), stop=stop_after_attempt(3), wait=wait_exponential(0.1, max=2), reraise=True
)
def _read(location: str, most_bytes: int | None) -> bytes:
    fs, path = _open_fs(location)
    if isinstance(fs, LocalFileSystem):
        return read_regular(path, most_bytes)
    if most_bytes is None:
        whole: bytes = fs.cat_file(path, **reading_options(split_protocol(location)[0] or ""))
        return whole
    with fs.open(path, "rb", cache_type="none") as file:  # s3fs's cat_file takes a start of 0 for the end of the file
        first: bytes = file.read(most_bytes)
    return first


def _open_fs(address: str) -> tuple[Any, str]:
    """Give fsspec's file system and the path in it."""
    check_password(address)
    protocol, path = split_protocol(address)
    if protocol is None:
        return file_system("file"), str(file_system("file")._strip_protocol(path))
    if "::" in protocol:
        fs, chained = url_to_fs(address)
        return fs, str(chained)
    client = hdfs(path.partition("/")[0]) if protocol == HDFS else file_system(protocol)
    return client, str(client._strip_protocol(address))


@functools.lru_cache(maxsize=8)
def file_system(protocol: str) -> Any:
    """Give fsspec's file system for a protocol, one for each process. Raises PasswordError, and what fsspec raises."""
    if protocol in S3_PROTOCOLS:
        check_endpoint()
    # With more at once, s3fs asks for the size of each image before it reads it.
    options = {"use_listings_cache": False, "max_concurrency": 1} if protocol in S3_PROTOCOLS else {}
    return fsspec.filesystem(protocol, **options)


def _list_folder(fs: Any, root: str, address: str) -> Listing:
    root, num_ignored = root.rstrip("/"), 0

    def images() -> Iterator[ImageRef]:
        nonlocal num_ignored
        with _source_errors(f"list {address}"):
            for path, entry in _entries(fs, root):
                uri = path.lstrip("/").removeprefix(root.lstrip("/")).lstrip("/")
                if _extension(uri) not in IMAGE_EXTENSIONS or entry["type"] != "file":
                    num_ignored += 1
                elif not is_text(uri):
                    yield ImageRef(key_of_bytes(os.fsencode(uri)), spelled(uri), "", "", -1, NOT_TEXT)
                else:
                    yield ImageRef(key_of_uri(uri), uri, _address_of(fs, path, address), _tag(entry), _size(entry))

    table = ImageTable.of(images(), f"{_address_of(fs, root, address)}/", by_uri=True)
    if not len(table):
        ignored = f" ({num_ignored} other files)" if num_ignored else ""
        raise SourceNotFoundError(f"no images in {address}{ignored}: looked for {', '.join(IMAGE_EXTENSIONS)}")
    return Listing(table, num_ignored)


def _address_of(fs: Any, path: str, address: str) -> str:
    """Write the address of a path in the file system of `address`; fsspec forgets the server of HDFS."""
    protocol, place = split_protocol(address)
    if protocol == HDFS:
        return f"{HDFS}://{place.partition('/')[0]}/{path.lstrip('/')}"
    return str(fs.unstrip_protocol(path))


def _extension(uri: str) -> str:
    """Give the ending of a file's name, in small letters; not by pathlib, which keeps the parts of each path it met."""
    stem, _, ending = uri.rpartition("/")[2].rpartition(".")
    return f".{ending.lower()}" if stem else ""


def _entries(fs: Any, root: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """List the paths below a folder, each with fsspec's record of it."""
    if isinstance(fs, LocalFileSystem):
        return _local_entries(root)
    if fs.protocol == S3_PROTOCOLS:
        return _s3_entries(fs, root)
    return iter(fs.find(root, detail=True).items()) if _has_own_find(fs) else _files_below(fs, root)


def _is_s3_folder(fs: Any, root: str) -> bool:
    """Return whether an address is a bucket or has objects below it.

    Not by s3fs's `isdir`, which holds all that is directly below, nor by its `info`, which asks for more than a listing
    and so needs more rights.
    """
    try:
        return next(_s3_entries(fs, root), None) is not None or "/" not in root
    except FileNotFoundError:
        return False


def _s3_entries(fs: Any, root: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """List objects as s3fs's `find` does, which holds a record of each until it has all, but page by page."""
    bucket, folder, _ = fs.split_path(root)
    more = {"Prefix": f"{folder}/" if folder else ""}
    while more:
        page = fs.call_s3("list_objects_v2", Bucket=bucket, **more, **fs.req_kw)
        for each in page.get("Contents", ()):
            yield f"{bucket}/{each['Key']}", {**each, "type": "file", "size": each["Size"]}
        more = more | {"ContinuationToken": page["NextContinuationToken"]} if page.get("IsTruncated") else {}


def _has_own_find(fs: Any) -> bool:
    """Return whether the file system lists everything its own way, as object stores do, not by fsspec's `find`."""
    if isinstance(fs, AsyncFileSystem):  # its `find` is made of `_find`
        return type(fs)._find is not AsyncFileSystem._find
    return type(fs).find is not AbstractFileSystem.find


def _files_below(fs: Any, folder: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """List files as fsspec's `find`, which leaves out folders that it cannot list: their images would seem gone."""
    for entry in fs.ls(folder or "/", detail=True):
        if entry["type"] == "directory":
            if entry["name"].rstrip("/") != folder.rstrip("/"):  # some list the folder itself too
                yield from _files_below(fs, entry["name"])
        else:
            yield entry["name"], entry


def _local_entries(root: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """List a folder on this machine as fsspec would; links are followed, which it does not do."""
    for each in files_below(root or "/"):
        sizes = {} if each.found is None else {"size": each.found.st_size, "mtime": each.found.st_mtime}
        yield each.path, {"type": "file" if each.is_regular else "other", **sizes}


def _list_table(fs: Any, path: str, address: str) -> Listing:
    table = _read_table(fs, path, address)
    uris = _column(table, "uri", pa.string(), address)
    name = next(name for name in ("key", "id", "uri") if name in table.column_names)
    names = _column(table, name, pa.int64() if name == "key" else pa.string(), address)
    if not len(uris):
        raise SourceError(f"{address} has no rows")
    folder = _address_of(fs, path, address).rsplit("/", 1)[0]

    def is_whole(uri: str) -> bool:
        return split_protocol(uri)[0] is not None or uri.startswith("/")

    def images() -> Iterator[ImageRef]:
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            for start in range(0, len(uris), BATCH_ROWS):
                names_K, uris_K = (column.slice(start, BATCH_ROWS).to_pylist() for column in (names, uris))
                keys_K = names_K if name == "key" else map(key_of_uri, names_K)
                places_K = [uri if is_whole(uri) else f"{folder}/{uri}" for uri in uris_K]
                entries_K = pool.map(_look_at, places_K)
                for key, uri, location, entry in zip(keys_K, uris_K, places_K, entries_K, strict=True):
                    yield ImageRef(key, uri, location, _tag(entry), _size(entry))

    images_N = ImageTable.of(images(), f"{folder}/")
    return Listing(images_N, len(uris) - len(images_N))


def _read_table(fs: Any, path: str, address: str) -> pa.Table:
    wanted = ("key", "id", "uri")
    with _source_errors(f"read the table {address}"):
        data = io.BytesIO(fs.cat_file(path))
        if path.lower().endswith(".csv"):
            # As text: type inference would make numbers of ids such as "007".
            types = pa.csv.ConvertOptions(column_types={"id": pa.string(), "uri": pa.string(), "key": pa.int64()})
            if long := long_rows(data, ","):
                line = min(each.line for each in long.values())
                raise CsvTextError(f"line {line}: a value in quotes has several lines, and no key or uri has; close it")
            data.seek(0)
            table = pa.csv.read_csv(data, convert_options=types)
        else:
            present = pa.parquet.read_schema(data).names
            table = pa.parquet.read_table(data, columns=[name for name in wanted if name in present])
    if "uri" not in table.column_names:
        raise SourceError(f"{address} has no column 'uri'; it needs uri, and key (int64) or id (string)")
    return table


def _column(table: pa.Table, name: str, wanted: pa.DataType, address: str) -> Any:
    """Read a column as an Arrow array. Raises SourceError where it is of another kind or has gaps."""
    column = table.column(name)
    fits = (pa.types.is_integer if pa.types.is_integer(wanted) else _is_text)(column.type)
    if not fits:
        way_out = "; use the name key for int64 keys" if name == "id" and pa.types.is_integer(column.type) else ""
        raise SourceError(f"{address}: column {name!r} is {column.type}, not {wanted}{way_out}")
    if column.null_count:
        raise SourceError(f"{address}: column {name!r} has {column.null_count} empty values")
    try:
        return cast("Any", column).cast(wanted)
    except pa.ArrowInvalid as error:
        raise SourceError(f"{address}: column {name!r}: {error}") from error


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _look_at(location: str) -> Mapping[str, Any]:
    """Give fsspec's record of a file; empty where there is none: reading it will say why."""
    try:
        fs, path = _open_fs(location)
        entry: Mapping[str, Any] = fs.info(path)
    except Exception:  # each object store's client has its own tree of errors
        return {}
    return entry


def _tag(entry: Mapping[str, Any]) -> str:
    """Give what changes when the file does: its etag, or size and time."""
    for name in ("ETag", "etag", "md5Hash", "content_md5"):
        if entry.get(name):
            return str(entry[name]).strip('"')
    times = (entry.get(name) for name in ("mtime", "LastModified", "last_modified", "modified", "updated", "created"))
    time = next((str(value) for value in times if value is not None), "")
    return f"{entry['size']}-{time}" if entry.get("size") is not None else ""


def _size(entry: Mapping[str, Any]) -> int:
    size = entry.get("size")
    return -1 if size is None else int(size)


NOT_TEXT = "the file's name is not UTF-8 (%XX means a byte of it): rename the file"
_ALL_BUT_PERCENT = "".join(map(chr, range(32, 127))).replace("%", "")


class LocalFile(NamedTuple):
    """A file below a folder. `found` is None where it cannot be looked at; reading it will say why."""

    path: str
    found: os.stat_result | None

    @property
    def is_regular(self) -> bool:
        """Whether it may have the bytes of an image; what cannot be looked at may."""
        return self.found is None or stat.S_ISREG(self.found.st_mode)


def check_reachable(path: str) -> None:
    """Raise PermissionError where this user may not even know what is at a path, which looks like nothing else."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        Path(path).stat()


def files_below(root: str) -> Iterator[LocalFile]:
    """List all files below a folder. A folder that is there as itself and behind links is listed as itself.

    Raises OSError where a folder cannot be listed: its images would be taken for vanished.
    """
    listed: set[tuple[int, int]] = set()
    folders, links = [root], list[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        found = Path(folder).stat()
        if (found.st_dev, found.st_ino) in listed:
            continue
        listed.add((found.st_dev, found.st_ino))
        with os.scandir(folder) as entries:
            children = sorted(entries, key=lambda entry: entry.name)
        for entry in children:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
                continue
            target = _target_of(entry)
            if target is not None and stat.S_ISDIR(target.st_mode):
                links.append(entry.path)
            else:
                yield LocalFile(entry.path, target)


def read_regular(path: str, most_bytes: int | None = None) -> bytes:
    """Read a regular file, or one that a link leads to, or its first `most_bytes`.

    Raises BadImageError for others, OSError."""
    try:
        with local.open_regular(path) as file:
            return file.read(most_bytes)
    except local.IrregularFileError as error:
        raise BadImageError(str(error)) from error


def is_text(name: str) -> bool:
    """Return whether a name from the disk is UTF-8, so that Parquet and JSON can hold it."""
    return not any("\udc80" <= each <= "\udcff" for each in name)


def spelled(name: str) -> str:
    """Return a name that is no UTF-8 for people: %XX for each byte beyond ASCII, and for %; urllib can undo it."""
    return quote_from_bytes(os.fsencode(name), safe=_ALL_BUT_PERCENT)


def _target_of(entry: "os.DirEntry[str]") -> os.stat_result | None:
    """Look at what a file is, or what its link leads to."""
    try:
        return entry.stat()
    except PermissionError:
        if entry.is_symlink() and not PurePath(entry.name).suffix:  # to a folder, perhaps
            raise
        return None
    except OSError:  # a link that leads nowhere, or in a circle
        return None
