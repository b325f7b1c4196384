"""The models of a store (store.json) and of a snapshot (the manifest), and the sealed form of both files."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import pydantic

from featurestore.errors import CorruptFileError, FormatVersionError, SpecMismatchError
from featurestore.parsing import first_mistake, parse_json
from featurestore.problems import Problem
from featurestore.storage.storage import Storage
from featurestore.text import DType

if TYPE_CHECKING:
    import numpy as np

FORMAT_VERSION = 1
LAST_SECOND = 253_402_300_799  # of the year 9999, since 1970: no time can be printed after it
MAX_VERSION = (1 << 63) - 1  # of a snapshot
_END = b"\n}"  # of a sealed file

FileKind = Literal["base", "delta"]
IndexKind = Literal["flat", "hnsw"]
MissingPolicy = Literal["error", "zeros", "learned"]

# numpy has no bfloat16: its 16 bits are carried as uint16. By name, as --help of a command is quicker without numpy.
STORAGE_DTYPES: Mapping[DType, str] = {"bfloat16": "uint16", "float16": "float16", "float32": "float32"}

_MOST_NAME, _MOST_PATH = 255, 1_024  # characters: of a name on a disk, of a key of S3
_NEVER = r"/\\:\x00-\x1f\x7f\ud800-\udfff"  # the last are halves of characters, which no file name can have
_PART = f"[^.{_NEVER}][^{_NEVER}]{{0,{_MOST_NAME - 1}}}"
_PATH_BELOW = re.compile(f"{_PART}(?:/{_PART})*")
_RANDOM_ID = re.compile(r"[0-9a-f]{32}")


def _check_relative(path: str) -> str:
    if len(path) > _MOST_PATH or not _PATH_BELOW.fullmatch(path):
        raise ValueError(Problem.NOT_A_RELATIVE_PATH.of(path[:200], _MOST_NAME))
    return path


def check_file_name(name: str) -> str:
    """Return a relative path of one part. Raises ValueError for others."""
    if "/" in name:
        raise ValueError(Problem.NOT_A_FILE_NAME.of(name[:200]))
    return _check_relative(name)


def is_random_id(text: str) -> bool:
    """Return whether a text is an id like those that are drawn here: 32 hexadecimal digits."""
    return _RANDOM_ID.fullmatch(text) is not None


def _check_id(text: str) -> str:
    if not is_random_id(text):
        raise ValueError(Problem.NOT_AN_ID.of(text[:200]))
    return text


# Paths and ids in files are of these types, in stores, models, runs and indexes: they are checked where they are read.
StorePath = Annotated[str, pydantic.AfterValidator(_check_relative)]  # below the place of what names it
FileName = Annotated[str, pydantic.AfterValidator(check_file_name)]
RandomId = Annotated[str, pydantic.AfterValidator(_check_id)]
OptionalId = Annotated[str, pydantic.AfterValidator(lambda text: text and _check_id(text))]  # empty: none was given
Version = Annotated[int, pydantic.Field(ge=0, le=MAX_VERSION)]  # 0 is the empty store
Count = Annotated[int, pydantic.Field(ge=0, le=MAX_VERSION)]  # of rows or bytes: an int64
Finite = Annotated[float, pydantic.Field(allow_inf_nan=False)]
ModelT = TypeVar("ModelT", bound=pydantic.BaseModel)


class Frozen(pydantic.BaseModel):
    """A record that never changes and has no other fields."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class Sealed(Frozen):
    """A record that has a file of its own, written by `seal`."""

    format_version: int = FORMAT_VERSION


class Int8Spec(Frozen):
    """A network in int8: the range of what each layer takes, measured on images, and what rounding costs."""

    ranges: tuple[tuple[str, Finite, Finite], ...]  # layer, smallest and largest input
    num_images: Count  # of which the ranges are
    num_held_out: Count  # others, on which the features are compared with those in float32
    mean_cosine: Finite  # of both

    def __str__(self) -> str:
        """Name the precision, and its cost."""
        return f"int8 (cosine {self.mean_cosine:.4f} with float32, on {self.num_held_out} images)"


class ExtractorSpec(Frozen):
    """The network that made the features; features of two networks never mix in one store."""

    backbone: str
    layer: str
    weights_digest: str
    preprocessing: str
    compute_dtype: str
    int8: Int8Spec | None = None  # where compute_dtype is int8, and only there

    @pydantic.model_serializer(mode="wrap")
    def _as_written(self, serialize: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_none(serialize(self), "int8")

    @property
    def precision(self) -> str | Int8Spec:
        """Return the type that the network multiplies in: `compute_dtype`, or `int8` with its calibration."""
        return self.int8 or self.compute_dtype

    @property
    def digest(self) -> str:
        """sha256 of all fields, hexadecimal."""
        return _digest(self)


class NetworkName(Frozen):
    """The name of the network as the maker of the store typed it; ExtractorSpec says what the network is."""

    backbone: str  # MODEL:LAYER
    weights: str  # imagenet, random:SEED or a file


class ReductionSpec(Frozen):
    """The basis of a compact store, whose rows are made of wider ones: `featurestore.format.codec` has the file."""

    kind: Literal["principal components"] = "principal components"
    path: StorePath
    sha256: str
    full_dim: Annotated[int, pydantic.Field(ge=1)]  # numbers of a row before


class StoreInfo(Sealed):
    """store.json: written once, when the store is made."""

    num_shards: Annotated[int, pydantic.Field(ge=1, le=1 << 16)] = 64
    name: str = "feature"
    dim: Annotated[int, pydantic.Field(ge=1)]
    dtype: DType = "bfloat16"
    extractor: ExtractorSpec
    network: NetworkName | None = None  # information only
    store_id: OptionalId = ""  # random, given when the store is made: differs from that of others made alike
    reduction: ReductionSpec | None = None  # of a compact store, and of it alone

    @pydantic.model_serializer(mode="wrap")
    def _as_written(self, serialize: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_none(serialize(self), "reduction")

    @pydantic.field_validator("num_shards")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(Problem.SHARDS_NOT_A_POWER.of(value))
        return value

    @property
    def kind(self) -> "StoreInfo":
        """All but id and network name: equal for stores whose files may be exchanged. It is in every data file."""
        return self.model_copy(update={"store_id": "", "network": None})

    @property
    def digest(self) -> str:
        """sha256 of `kind`, hexadecimal."""
        return _digest(self.kind)

    @property
    def full_dim(self) -> int:
        """Numbers of a row as its network makes it: `dim`, unless the store is compact."""
        return self.reduction.full_dim if self.reduction else self.dim

    @property
    def width_text(self) -> str:
        """Describe the width of a row: 256, or of a compact store 256 of 4,096."""
        return f"{self.dim:,} of {self.full_dim:,}" if self.reduction else f"{self.dim:,}"

    @property
    def storage_dtype(self) -> "np.dtype[Any]":
        """numpy's dtype of the rows: uint16 bits for bfloat16, else the dtype itself."""
        import numpy as np

        return np.dtype(STORAGE_DTYPES[self.dtype])

    @property
    def row_bytes(self) -> int:
        """Bytes of one feature."""
        return self.dim * self.storage_dtype.itemsize

    def check_same(self, other: "StoreInfo", where: str) -> None:
        """Raise SpecMismatchError, naming every field in which `other` (found at `where`) differs."""
        if self.kind == other.kind:
            return
        found = differing(self.kind.model_dump(mode="json"), other.kind.model_dump(mode="json"))
        if found:
            fields = "; ".join(f"{name} is {theirs!r} instead of {mine!r}" for name, mine, theirs in found)
            raise SpecMismatchError(Problem.ANOTHER_KIND, where, fields)


class FileEntry(Frozen):
    """One immutable data file of one shard."""

    path: StorePath
    bytes: Count
    rows: Count
    num_deleted: Count
    sha256: str
    xxh3_128: str  # as strong against accidents, and ten times faster: checked by every read of the whole file
    kind: FileKind
    info_digest: str
    based_on: Version = 0  # the snapshot against which its keys were checked for collisions
    statistics_path: StorePath | None = None  # none for a small file: its rows are read instead
    statistics_sha256: str | None = None

    @property
    def num_live(self) -> int:
        """Rows that are not tombstones."""
        return self.rows - self.num_deleted


class SourceSnapshot(Frozen):
    """A snapshot of another store, by its ids (`featurestore.store`), of whose rows a snapshot's own are made."""

    url: str
    version: Version
    store_id: OptionalId
    commit_id: OptionalId


class Manifest(Sealed):
    """One snapshot: the files of every shard, oldest first. Its creation is the commit."""

    version: Version
    parent: OptionalId | None
    commit_id: OptionalId  # empty of the empty store alone
    writer: str
    time_s: Annotated[float, pydantic.Field(ge=0, le=LAST_SECOND)]  # for display; order comes from the version alone
    operation: str
    num_quarantined: int = 0
    num_files: int
    file_rows: int
    file_bytes: int
    shards: dict[int, tuple[FileEntry, ...]]
    mirrors: SourceSnapshot | None = None  # of a store whose rows are made of another store's

    @pydantic.model_serializer(mode="wrap")
    def _as_written(self, serialize: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_none(serialize(self), "mirrors")

    @property
    def entries(self) -> list[FileEntry]:
        """All files, shard by shard."""
        return [entry for entries in self.shards.values() for entry in entries]

    def files(self, shard: int) -> tuple[FileEntry, ...]:
        """Return the files of `shard`, newest last; empty where nothing was ever written."""
        return self.shards.get(shard, ())


def read_sealed(storage: Storage, path: str, model_class: type[ModelT]) -> ModelT:
    """Read a sealed file. Raises FileNotFoundError, FormatVersionError, CorruptFileError."""
    return unseal(storage.read_bytes(path), model_class, storage.full(path))


def create_sealed(storage: Storage, path: str, model: ModelT) -> ModelT:
    """Create a sealed file unless it exists; return its content, by this writer or another.

    Raises StorageError: then it is not known yet whether it was made.
    """
    return unseal(storage.create_or_read(path, seal(model)), type(model), storage.full(path))


def seal(model: pydantic.BaseModel) -> bytes:
    """Return `model` as JSON with the sha256 of its own content at the end, so that a flipped bit is found."""
    content = _encode(model.model_dump(mode="json"))
    return content.removesuffix(_END) + _digest_line(_sha256(content))


def unseal(data: bytes, model_class: type[ModelT], path: str) -> ModelT:
    """Return the model that `seal` wrote; CorruptFileError for changed bytes, FormatVersionError for a newer format."""
    try:
        fields = parse_json(data)
    except ValueError as error:
        raise CorruptFileError(Problem.DAMAGED, path, error) from error
    if not isinstance(fields, dict):
        raise CorruptFileError(Problem.NOT_AN_OBJECT, path)
    for name in ("format_version", "digest"):
        if name not in fields:
            raise CorruptFileError(Problem.FIELD_MISSING, path, name)
    format_version, digest = fields["format_version"], fields.pop("digest")
    # Of the bytes as they are: to encode the fields again takes ten times as long as to read them.
    line = _digest_line(digest)
    is_whole = data.endswith(line) and _sha256(data.removesuffix(line) + _END) == digest
    if isinstance(format_version, int) and format_version > FORMAT_VERSION and is_whole:
        raise FormatVersionError(Problem.FORMAT_TOO_NEW, path, format_version, FORMAT_VERSION)
    try:
        model = model_class.model_validate(fields)
    except pydantic.ValidationError as error:
        raise CorruptFileError(Problem.DAMAGED, path, first_mistake(error)) from error
    if not is_whole:
        raise CorruptFileError(Problem.WRONG_DIGEST, path)
    return model


def _digest_line(digest: str) -> bytes:
    return f',\n "digest": "{digest}"'.encode(errors="surrogatepass") + _END


def _without_none(fields: dict[str, Any], name: str) -> dict[str, Any]:
    """Leave out a field that says nothing."""
    return {each: value for each, value in fields.items() if each != name or value is not None}


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """List names, with dots between the levels, and values of nested mappings."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def differing(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """List the values that differ between two nested mappings: dotted name and both values; None if missing."""
    mine, theirs = dict(flat(here)), dict(flat(there))
    both = ((name, mine.get(name), theirs.get(name)) for name in dict.fromkeys([*mine, *theirs]))
    return [(name, one, other) for name, one, other in both if one != other]


def _encode(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, indent=1, ensure_ascii=True).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest(model: pydantic.BaseModel) -> str:
    return _sha256(_encode(model.model_dump(mode="json")))
