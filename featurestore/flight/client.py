"""The client of the feature service: the lookups of a partition, over one server or several that share the shards.

Letters of shapes: U keys asked, S shards, D feature width.
"""

import os
import ssl
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple, get_args
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from featurestore.errors import AccessError, AnotherStoreError, MissingKeysError, ServerError
from featurestore.flight.link import Answer, ServerLink
from featurestore.flight.protocol import SCHEMES, Described, codec_from
from featurestore.keys import Int64Array, shard_of
from featurestore.lookup.partition import Lookup, output_for
from featurestore.snapshot import missing_message
from featurestore.spec import MissingPolicy
from featurestore.text.dtypes import DType

_CALL_BYTES = 256 << 20  # of features in one call: each has its deadline
_CALL_KEYS = 1 << 20


def connect(
    address: str,
    *,
    token: str | None = None,
    ca: str | os.PathLike[str] | None = None,
    version: int | None = None,
    missing: MissingPolicy = "error",
    timeout_s: float = 60.0,
) -> "FeatureClient":
    """Connect to feature servers (`python -m featurestore serve`): `grpc://HOST:PORT`, or with `grpc+tls://` over TLS.

    Several servers that share the shards of a store are written one after the other, with commas: the scheme once, or
    each with its own. `token` is one of the server's --token-file; `ca` a file of certificates to trust, by default
    those of the system. The newest snapshot that all of them offer is opened, or that of `version`, and stays the same.
    `missing` is as of `FeaturePartition`. Every call to a server has `timeout_s`; a lookup of more than 256 MB makes
    several. Raises UnavailableError, AccessError, DeadlineError, SnapshotNotFoundError; AnotherStoreError where servers
    have different stores, ServerError where together they lack a shard.
    """
    if missing not in get_args(MissingPolicy):
        raise ValueError(f"missing={missing!r} is none of {', '.join(get_args(MissingPolicy))}")
    if timeout_s <= 0:
        raise ValueError(f"timeout_s={timeout_s} is not positive")
    links = [ServerLink(each, token, _read(ca), timeout_s) for each in addresses(address)]
    try:
        return FeatureClient(links, version, missing)
    except BaseException:
        for link in links:
            link.close()
        raise


def addresses(text: str) -> list[str]:
    """Return the addresses in a text, each with its scheme. Raises ValueError naming the one that is none."""
    found: list[str] = []
    for each in text.split(","):
        scheme = urlsplit(found[-1]).scheme if found and "://" not in each else ""
        found.append(f"{scheme}://{each}" if scheme else each)
        parts = urlsplit(found[-1])
        try:
            complete = bool(parts.hostname and parts.port)
        except ValueError:
            complete = False
        if parts.scheme not in SCHEMES or not complete or parts.path not in ("", "/"):
            raise ValueError(f"{each!r} is no address of a feature server: grpc://HOST:PORT or grpc+tls://HOST:PORT")
    return found


class FeatureClient:
    """The rows of one snapshot, looked up at servers. Lookups may run in several threads at once.

    The bits are those that `FeaturePartition` gives. A client keeps its snapshot; a server that no longer has it open
    opens it again, until it has expired (SnapshotNotFoundError).
    """

    def __init__(self, links: Sequence[ServerLink], version: int | None, missing: MissingPolicy) -> None:
        """Use `connect`."""
        self._links = links
        self._pool = ThreadPoolExecutor(len(links), thread_name_prefix="features")
        described = self._describe(version)
        first, ranges = described[0]
        self.info = first.info
        self.codec = codec_from(first.info, ranges)
        self.snapshot_id = first.snapshot_id
        self.snapshot_version = first.snapshot_id.version
        self.num_rows = 0
        self.missing_policy, self.missing_count = missing, 0
        self._lock = threading.Lock()
        self._link_S = np.full(self.info.num_shards, -1, np.int64)  # which server has a shard
        for number, (each, _) in enumerate(described):
            self._add(number, each)
        lacking = np.flatnonzero(self._link_S < 0)
        if len(lacking):
            raise ServerError(
                f"{self._names} lack {len(lacking)} of {self.info.num_shards} shards, the first is {lacking[0]}:"
                " name the servers that have them too"
            )

    @property
    def dim(self) -> int:
        """Width of a feature."""
        return self.info.dim

    @property
    def dtype(self) -> DType:
        """The store's dtype; bfloat16 rows come as their bits in uint16, int8 rows as codes in uint8: see `codec`."""
        return self.info.dtype

    def lookup(self, keys_U: npt.ArrayLike, out: npt.NDArray[Any] | None = None) -> Lookup:
        """Return the features of `keys_U` in the order asked, written into `out` (U, D) where it is given.

        As `FeaturePartition.lookup`, which says what happens to a key without a feature. Raises UnavailableError,
        DeadlineError, AccessError, ServerError; then `out` may be filled in part.
        """
        asked_U = _keys(keys_U)
        out = output_for(self.info, len(asked_U), out)
        missing_U = self._ask(asked_U, out)
        if missing_U.any():
            self._note_missing(asked_U[missing_U])
        return Lookup(out, missing_U)

    def contains(self, keys_U: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return which keys have a feature, (U,); none is sent. Raises what `lookup` raises of servers."""
        return ~self._ask(_keys(keys_U), None)

    def __enter__(self) -> "FeatureClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown()
        for link in self._links:
            link.close()

    @property
    def _names(self) -> str:
        return ", ".join(link.address for link in self._links)

    def _describe(self, version: int | None) -> list[tuple[Described, bytes]]:
        """Ask every server for the snapshot: by default the newest one that all of them offer."""
        described = list(self._pool.map(lambda link: link.describe(version), self._links))
        versions = {each.snapshot_id.version for each, _ in described}
        if len(versions) > 1:
            oldest = min(versions)
            described = list(self._pool.map(lambda link: link.describe(oldest), self._links))
        return described

    def _add(self, number: int, described: Described) -> None:
        """Take in what one server has. Raises AnotherStoreError, or ServerError where another one has it too."""
        found, mine = described.snapshot_id, self.snapshot_id
        ids = [(each.store_id, each.commit_id, each.version) for each in (found, mine)]
        if ids[0] != ids[1] or described.info.kind != self.info.kind:
            first, other = self._links[0].address, self._links[number].address
            raise AnotherStoreError(
                f"{first} has {mine.described()}, but {other} has {found.described()}: servers must share one store"
            )
        shards = np.asarray(described.shards, np.int64)
        taken = shards[self._link_S[shards] >= 0]
        if len(taken):
            first, other = self._links[self._link_S[taken[0]]].address, self._links[number].address
            raise ServerError(f"{first} and {other} both have {len(taken)} shards, as {taken[0]}: name one of them")
        self._link_S[shards] = number
        self.num_rows += described.num_rows

    def _ask(self, keys_U: Int64Array, out_UD: npt.NDArray[Any] | None) -> npt.NDArray[np.bool_]:
        """Ask every server for its keys, all at once; return which are missing."""
        missing_U = np.empty(len(keys_U), np.bool_)

        def ask(call: _CallPart) -> None:
            answer = Answer(self.info, out_UD, missing_U, call.rows)
            call.link.exchange(self.snapshot_version, call.keys, answer, features=out_UD is not None)

        calls = self._calls(keys_U)
        if len(calls) == 1:
            ask(calls[0])
            return missing_U
        futures = [self._pool.submit(ask, call) for call in calls]
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            future.cancel()
        wait(futures)  # nothing writes into `out` any more when an error is raised
        for future in futures:
            if not future.cancelled():
                future.result()
        return missing_U

    def _calls(self, keys_U: Int64Array) -> list["_CallPart"]:
        """Cut a lookup into calls, each of one server and within the limit of a call."""
        size = max(1, min(_CALL_KEYS, _CALL_BYTES // self.info.row_bytes))
        if len(self._links) == 1:
            spans = [slice(start, start + size) for start in range(0, len(keys_U), size)]
            return [_CallPart(self._links[0], keys_U[span], span) for span in spans]
        link_U = self._link_S[shard_of(keys_U, self.info.num_shards)]
        calls = []
        for number, link in enumerate(self._links):
            rows = np.flatnonzero(link_U == number)
            parts = [rows[start : start + size] for start in range(0, len(rows), size)]
            calls += [_CallPart(link, keys_U[part], part) for part in parts]
        return calls

    def _note_missing(self, missing_keys: Int64Array) -> None:
        if self.missing_policy == "error":
            where = f"snapshot {self.snapshot_version} of {self.snapshot_id.url} at {self._names}"
            raise MissingKeysError(missing_message(missing_keys, where))
        with self._lock:
            self.missing_count += len(missing_keys)


class _CallPart(NamedTuple):
    """The keys of one call to one server, and their rows in the lookup."""

    link: ServerLink
    keys: Int64Array
    rows: slice | Int64Array


def _keys(keys_U: npt.ArrayLike) -> Int64Array:
    given_U = np.asarray(keys_U)
    if given_U.ndim > 1:
        raise ValueError(f"keys have shape {given_U.shape}, and have to be one list")
    if given_U.dtype.kind in "US":
        raise TypeError("keys are texts, and have to be whole numbers (int64): featurestore.keys_of_uris makes them")
    if given_U.size and given_U.dtype.kind == "f":  # 1.5 would ask for 1, and 2**60 as a float for a key next to it
        raise TypeError(f"keys are {given_U.dtype}, and have to be whole numbers (int64)")
    return np.ascontiguousarray(np.array(keys_U, dtype=np.int64, ndmin=1, copy=None))


def _read(ca: str | os.PathLike[str] | None) -> str | None:
    if ca is None:
        return None
    try:
        text = Path(ca).read_text()
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (OSError, ValueError) as error:  # what is no certificate is an SSLError, which is an OSError
        reason = "it has no certificate in PEM" if isinstance(error, ssl.SSLError | ValueError) else str(error)
        raise AccessError(f"cannot read the certificates ca={os.fspath(ca)}: {reason}") from error
    return text
