"""What a client and a server of features say to each other: requests, answers and errors; in words in docs/FLIGHT.md.

Letters of shapes: U keys asked, D feature width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from pyarrow import flight
from pydantic import BaseModel, ConfigDict, ValidationError

from featurestore import errors
from featurestore.format.datafile import FEATURE, KEY, schema_of
from featurestore.identity import SnapshotId
from featurestore.keys import Int64Array
from featurestore.spec import StoreInfo
from featurestore.text import first_mistake

DESCRIBE = "snapshot"  # the action that describes a snapshot
FOUND = "found"
KEYS_SCHEMA = pa.schema([pa.field(KEY, pa.int64(), nullable=False)])
SECURE = "grpc+tls"
SCHEMES = ("grpc", "grpc+tcp", SECURE)
_MESSAGE_CHARACTERS = 2_000  # gRPC sends no more than 8 kB of them
ModelT = TypeVar("ModelT", bound=BaseModel)


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Asked(_Message):
    """The command of an exchange, and the body of the action `snapshot`: which snapshot, the newest by default."""

    version: int | None = None
    features: bool = True  # of an exchange: false asks only which keys are there


class ScanTicket(_Message):
    """The ticket of a scan of one shard, or of all that the server has."""

    version: int | None = None
    shard: int | None = None
    columns: tuple[str, ...] | None = None
    decode: bool = True  # features as lists of float32; false: bytes as stored


class Described(_Message):
    """A snapshot as one server has it; `ranges` come after it, as bytes."""

    info: StoreInfo
    snapshot_id: SnapshotId
    newest: int  # the newest snapshot that the server offers
    shards: tuple[int, ...]
    num_rows: int  # in these shards


class _SentError(_Message):
    name: str
    message: str


def answer_schema(info: StoreInfo, features: bool) -> pa.Schema:
    """Return the columns of an answer to keys: which are there, and features as stored, zeros where there is none."""
    found = pa.field(FOUND, pa.bool_(), nullable=False)
    return pa.schema([found, schema_of(info).field(FEATURE)] if features else [found])


def keys_batch(keys_U: Int64Array) -> pa.RecordBatch:
    """Make a batch of keys to ask for; the numbers are not copied."""
    return pa.record_batch([pa.array(keys_U)], schema=KEYS_SCHEMA)


def keys_of(batch: pa.RecordBatch) -> Int64Array:
    """Return the keys that a batch asks for, (U,). Raises QueryError for another column than int64 `key`."""
    if batch.schema.names != [KEY] or batch.schema.types != [pa.int64()] or batch.column(0).null_count:
        raise errors.QueryError(f"keys come as one column {KEY!r} of int64 without nulls, not as {batch.schema}")
    return np.asarray(batch.column(0).to_numpy(zero_copy_only=False))


def parsed(model_class: type[ModelT], data: bytes) -> ModelT:
    """Parse a message. Raises QueryError naming field and value."""
    try:
        return model_class.model_validate_json(data or b"{}")
    except ValidationError as error:
        raise errors.QueryError(f"{model_class.__name__}: {first_mistake(error)}") from error


@contextmanager
def errors_sent() -> Iterator[None]:
    """Turn an error of ours into one that Flight sends, with class and message as JSON in it."""
    try:
        yield
    except errors.FeatureStoreError as error:
        sent = _SentError(name=type(error).__name__, message=str(error)[:_MESSAGE_CHARACTERS])
        busy = isinstance(error, errors.UnavailableError)
        kind: Any = flight.FlightUnavailableError if busy else flight.FlightServerError
        raise kind(sent.message, extra_info=sent.model_dump_json().encode()) from error


def error_received(error: BaseException) -> errors.FeatureStoreError | None:
    """Return the error of ours that `errors_sent` has sent; None where it is another one."""
    try:
        sent = _SentError.model_validate_json(getattr(error, "extra_info", None) or b"")
    except ValidationError:
        return None
    found = getattr(errors, sent.name, errors.ServerError)
    is_ours = isinstance(found, type) and issubclass(found, errors.FeatureStoreError)
    return found(sent.message) if is_ours else errors.ServerError(sent.message)
