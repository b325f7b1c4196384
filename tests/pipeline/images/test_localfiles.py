"""Folders with pipes, links, names that are no text and files that nobody may read: no hang, and nothing is lost."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featurestore import FeatureStore
from pipeline.errors import BadImageError, SourceError
from pipeline.features.refresh import extract, refresh
from pipeline.images.source import list_images, read_image
from pipeline.options import ExtractOptions, RefreshOptions

NETWORK = "mobilenet_v3_small:avgpool"
ROOT = Path(__file__).parents[3]
NOBODY = 65534


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, one of them in a folder below."""
    for uri in ("a.jpg", "deep/b.jpg"):
        path = tmp_path / "images" / uri
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(uri.encode())
    return tmp_path / "images"


def uris(folder: Path) -> list[str]:
    return [ref.uri for ref in list_images(str(folder)).images]


@pytest.mark.timeout(20)
def test_pipes_sockets_and_devices_are_no_images(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jpg")
    (folder / "link.jpg").symlink_to(folder / "pipe.jpg")
    (folder / "null.png").symlink_to("/dev/zero")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(str(folder / "socket.jpg"))
        listing = list_images(str(folder))
    assert [ref.uri for ref in listing.images] == ["a.jpg", "deep/b.jpg"] and listing.num_ignored == 4


@pytest.mark.timeout(20)
def test_a_table_that_names_a_pipe_waits_for_nobody(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jpg")
    (folder / "table.csv").write_text("uri\na.jpg\npipe.jpg\n/dev/zero\n")
    good, pipe, device = list_images(str(folder / "table.csv")).images
    assert read_image(good.location) == b"a.jpg"
    for ref in (pipe, device):
        with pytest.raises(BadImageError, match="not a regular file"):
            read_image(ref.location)


@pytest.mark.timeout(20)
def test_links_in_a_circle_end(folder: Path) -> None:
    (folder / "self.jpg").symlink_to("self.jpg")
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "ping").symlink_to(folder / "pong")
    (folder / "pong").symlink_to(folder / "ping")
    for number in range(12):  # followed wherever they lead, these would be 12! paths
        (folder / f"many{number}").mkdir()
        for other in range(12):
            (folder / f"many{number}" / f"to{other}").symlink_to(folder / f"many{other}")
    listing = list_images(str(folder))
    assert [ref.uri for ref in listing.images] == ["a.jpg", "deep/b.jpg", "self.jpg"]
    with pytest.raises(BadImageError, match=r"cannot read .*/self\.jpg: Too many levels"):
        read_image(listing.images[2].location)


def test_links_lead_to_files_and_folders_also_outside(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "more").mkdir(parents=True)
    (outside / "c.jpg").write_bytes(b"c")
    (outside / "more" / "d.jpg").write_bytes(b"d")
    (folder / "file.jpg").symlink_to(outside / "c.jpg")
    (folder / "gone.jpg").symlink_to(outside / "gone.jpg")
    (folder / "x").symlink_to(outside)
    (folder / "y").symlink_to(outside)  # the same folder again
    (folder / "z").symlink_to(folder / "deep")  # listed as itself
    found = {ref.uri: ref for ref in list_images(str(folder)).images}
    assert list(found) == ["a.jpg", "deep/b.jpg", "file.jpg", "gone.jpg", "x/c.jpg", "x/more/d.jpg"]
    assert read_image(found["file.jpg"].location) == b"c" and read_image(found["x/more/d.jpg"].location) == b"d"
    with pytest.raises(BadImageError, match="no such file"):
        read_image(found["gone.jpg"].location)
    before = found["file.jpg"].source_tag
    os.utime(outside / "c.jpg", (1, 1))
    assert {ref.uri: ref for ref in list_images(str(folder)).images}["file.jpg"].source_tag != before


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), np.uint8)).save(path, "JPEG")


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:weights random")
def test_a_run_over_all_of_these(client, tmp_path: Path) -> None:
    """One image comes through, a pipe is ignored, a name that is no text is in quarantine until it is renamed."""
    folder, store = tmp_path / "images", str(tmp_path / "features")
    write_image(folder / "good.jpg", 1)
    named = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jpg"))
    write_image(named, 2)
    os.mkfifo(folder / "pipe.jpg")
    summary = extract(
        ExtractOptions(images=str(folder), store=store, weights="random:0", num_shards=1, backbone=NETWORK), client
    )
    assert (summary.num_images, summary.num_new, summary.num_ignored, len(summary.bad)) == (2, 1, 1, 1)
    (row,) = FeatureStore.open(store).quarantine_rows()
    assert (row.uri, row.reason) == ("caf\\xe9.jpg", "no such file")
    named.rename(folder / "café.jpg")
    summary = refresh(RefreshOptions(images=str(folder), store=store), client)
    assert summary.num_new == 1 and FeatureStore.open(store).quarantine_rows() == []


def as_nobody(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs a script that gives up being root, who may read everything, once it has imported what it needs."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )


LIST = f"""
import os, sys
from pipeline.errors import BadImageError, SourceError
from pipeline.images.source import list_images, read_image
if os.geteuid() == 0:
    list_images(sys.argv[2])  # so that nothing is imported later on
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
try:
    for ref in list_images(sys.argv[1]).images:
        try:
            print(ref.uri, read_image(ref.location).decode())
        except BadImageError as error:
            print(ref.uri, "bad:", error)
except SourceError as error:
    print("error:", error)
"""


@pytest.fixture
def open_folder(folder: Path) -> Iterator[Path]:
    """A copy of `folder` that every user can reach.

    Not below pytest's folder: each session that begins takes the rights of others away from it.
    """
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        Path(place).chmod(0o755)
        yield Path(shutil.copytree(folder, Path(place) / "images"))


@pytest.mark.long
@pytest.mark.parametrize(
    ("locked", "mode", "expected"),
    [
        ("a.jpg", 0o000, "a.jpg bad: cannot read {folder}/a.jpg: Permission denied"),
        ("deep", 0o000, "error: cannot list"),
        ("deep", 0o444, "deep/b.jpg bad: cannot read {folder}/deep/b.jpg: Permission denied"),
        (".", 0o000, "error: cannot list"),
        ("..", 0o000, "error: cannot list"),
    ],
)
def test_what_nobody_may_read(tmp_path: Path, open_folder: Path, locked: str, mode: int, expected: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.jpg").write_bytes(b"x")
    place = open_folder / locked
    before = place.stat().st_mode & 0o777
    place.chmod(mode)
    try:
        done = as_nobody(LIST, str(open_folder), str(other))
    finally:
        place.chmod(before)
    assert done.returncode == 0, done.stderr
    assert any(line.startswith(expected.format(folder=open_folder)) for line in done.stdout.splitlines()), done.stdout


def test_a_folder_that_cannot_be_listed_is_one_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(place: str) -> None:
        raise PermissionError(13, "Permission denied", str(place))

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(SourceError, match=r"cannot list .*Permission denied"):
        list_images(str(folder))
