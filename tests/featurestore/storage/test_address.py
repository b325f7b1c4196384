"""Addresses that lead nowhere: one line each, before a file is made of them; and buckets that are not there."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from featurestore.errors import USAGE, AddressError, BucketNotFoundError
from featurestore.published.paths import run_path
from featurestore.storage.storage import Storage

Opener = Callable[[str], object]


@pytest.mark.parametrize("opened", [Storage, run_path])
@pytest.mark.parametrize("address", ["s3://", "s3:///x", "s3:/", "s3a://", "s3:///x/y", str(Path("s3://"))])
def test_an_address_without_a_bucket_is_no_folder_of_this_machine(address: str, opened: Opener) -> None:
    with pytest.raises(AddressError, match=f"^{address} has no bucket: [^\\n]+$") as raised:
        opened(address)
    assert raised.value.exit_code == USAGE


@pytest.mark.parametrize("opened", [Storage, run_path])
@pytest.mark.parametrize(
    ("address", "told"),
    [("S3://bucket/x", "write s3://"), ("s3://Bad_Bucket!/x", "Bad_Bucket! is not the name of a bucket")],
)
def test_an_address_that_cannot_be_one_gets_a_line(address: str, told: str, opened: Opener) -> None:
    with pytest.raises(AddressError, match=f"^{re.escape(address)}: [^\\n]*{re.escape(told)}[^\\n]*$"):
        opened(address)


def test_names_of_files_that_begin_like_an_address_are_files() -> None:
    assert Storage("s3:x").is_local and Storage("s3").is_local and run_path("s3:x") == Path("s3:x")


def test_a_bucket_that_is_not_there_is_named(missing_bucket: str) -> None:
    storage = Storage(f"{missing_bucket}/runs")
    uses: list[Callable[[], object]] = [
        storage.check_bucket,
        storage.now,
        lambda: storage.write_bytes("a", b"x"),
        lambda: storage.create_exclusive("a", b"x"),
    ]
    for use in uses:
        with pytest.raises(
            BucketNotFoundError, match=r"nobucket/runs.*: the object store has no bucket nobucket$"
        ) as raised:
            use()
        assert raised.value.exit_code == USAGE
