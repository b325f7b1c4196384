"""The protocol of the feature server: requests, answers and errors, as described in docs/OPERATE.md.

Letters of shapes: U keys asked, D feature width.
"""

from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from pyarrow import flight
from pydantic import BaseModel, ConfigDict, ValidationError

from featurestore import errors
from featurestore.format.datafile import FEATURE, KEY, schema_of
from featurestore.keys import Int64Array
from featurestore.parsing import first_mistake
from featurestore.problems import Problem
from featurestore.spec import StoreInfo
from featurestore.store import SnapshotId

DESCRIBE = "snapshot"  # the action that describes a snapshot
FOUND = "found"
KEYS_SCHEMA = pa.schema([pa.field(KEY, pa.int64(), nullable=False)])
MAX_KEYS = 1 << 20  # in one message
SECURE = "grpc+tls"
TOKEN_HEADER = "authorization"
_MESSAGE_CHARACTERS = 2_000  # gRPC sends no more than 8 kB of them
ModelT = TypeVar("ModelT", bound=BaseModel)


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Asked(_Message):
    """The command of an exchange, and the body of the action `snapshot`: which snapshot, the newest by default."""

    version: int | None = None
    features: bool = True  # of an exchange: false asks only which keys are there


class Described(_Message):
    """A snapshot as the server has it."""

    info: StoreInfo
    snapshot_id: SnapshotId
    num_rows: int


class _SentError(_Message):
    name: str
    message: str


def bearer(token: str) -> bytes:
    """Return the value of the header that carries a token."""
    return f"Bearer {token}".encode()


def answer_schema(info: StoreInfo, features: bool) -> pa.Schema:
    """Return the columns of an answer to keys: which are there, and features as stored, zeros where there is none."""
    found = pa.field(FOUND, pa.bool_(), nullable=False)
    return pa.schema([found, schema_of(info).field(FEATURE)] if features else [found])


def keys_of(batch: pa.RecordBatch) -> Int64Array:
    """Return the keys that a batch asks for, (U,).

    Raises QueryError for another column than int64 `key`, and for more than MAX_KEYS.
    """
    if batch.schema.names != [KEY] or batch.schema.types != [pa.int64()] or batch.column(0).null_count:
        raise errors.QueryError(Problem.WRONG_KEY_COLUMNS, KEY, batch.schema)
    if len(batch) > MAX_KEYS:
        raise errors.QueryError(Problem.TOO_MANY_KEYS, len(batch), MAX_KEYS)
    return np.asarray(batch.column(0).to_numpy(zero_copy_only=False))


def parse_message(model_class: type[ModelT], data: bytes) -> ModelT:
    """Parse a message. Raises QueryError naming field and value."""
    try:
        return model_class.model_validate_json(data or b"{}")
    except ValidationError as error:
        raise errors.QueryError(Problem.BAD_REQUEST, model_class.__name__, first_mistake(error)) from error


def error_sent(error: errors.FeatureStoreError) -> Any:
    """Return the error of Flight that carries one of ours, with class and message as JSON in it."""
    sent = _SentError(name=type(error).__name__, message=str(error)[:_MESSAGE_CHARACTERS])
    kind: Any = flight.FlightServerError  # its stub does not know extra_info
    return kind(sent.message, extra_info=sent.model_dump_json().encode())


def error_received(error: BaseException) -> errors.FeatureStoreError | None:
    """Return the error that `error_sent` has encoded, or None for any other error."""
    try:
        sent = _SentError.model_validate_json(getattr(error, "extra_info", None) or b"")
    except ValidationError:
        return None
    found = getattr(errors, sent.name, errors.ServerError)
    is_ours = isinstance(found, type) and issubclass(found, errors.FeatureStoreError)
    return found(sent.message) if is_ours else errors.ServerError(sent.message)
