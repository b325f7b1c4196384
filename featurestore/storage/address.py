"""Addresses as a user types them, and the paths below them: one that leads elsewhere is refused before it is used."""

import re

from featurestore.errors import AddressError, StorageError

S3_PROTOCOLS = ("s3", "s3a")
_S3 = re.compile(r"(s3a?):(?:/{1,2}([^/]*).*)?", re.IGNORECASE | re.DOTALL)  # pathlib makes one slash of two, or none
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}|arn:.+")  # as the client has it; servers are stricter


def check_address(address: str) -> None:
    """Raise AddressError where an address of S3 has no bucket (its variable was not set), or no possible name of one.

    Also where its scheme is in capital letters, and for HDFS without a server. No other address is looked at.
    """
    if address.startswith("hdfs:///"):
        path = address.removeprefix("hdfs:///")
        raise AddressError(
            f"{address} has no server: write hdfs://HOST:PORT/{path}, or hdfs://default/{path} for the server that"
            " Hadoop's configuration names"
        )
    match = _S3.fullmatch(address)
    if match is None:
        return
    scheme, bucket = match[1], match[2]
    if not bucket:
        raise AddressError(f"{address} has no bucket: write s3://BUCKET/...; is a variable in it not set?")
    if scheme not in S3_PROTOCOLS:
        raise AddressError(f"{address}: {scheme}:// is not known; write {scheme.lower()}://")
    if not _BUCKET.fullmatch(bucket):
        raise AddressError(
            f"{address}: {bucket} is no name of a bucket; those have letters, digits, dots, hyphens and underscores"
        )


def leads_out(path: str) -> bool:
    """Return whether a path, relative to a place, has a part that may lead out of it, or that no file has: .., a NUL.

    "." and an absolute path are of these; "", the place itself, is not.
    """
    return path.startswith("/") or "\0" in path or any(part in (".", "..") for part in path.split("/"))


def check_below(path: str, place: str, writing: bool) -> None:
    """Raise StorageError where a path is not below its place; `writing`: where it is the place itself as well."""
    if leads_out(path) or (writing and not path):
        raise StorageError(f"{path!r} is not a path below {place}: nothing is {'changed' if writing else 'read'} there")
