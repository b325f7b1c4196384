"""Changed samples are found out though names, sizes and counts are equal; known files are read once."""

import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from featurestore.storage import storage
from featurestore.storage.storage import Storage
from tests.trainer.conftest import change_column, make_places
from trainer.comm import SoloComm
from trainer.config import load_config
from trainer.errors import CheckpointError
from trainer.main import train
from trainer.runs.open import open_run
from trainer.samples import survey as content
from trainer.samples.index import open_index
from trainer.samples.survey import samples_digest
from trainer.schema.fields import load_schema

OLD_S = 1_000_000_000
FIRST = "day=2026-01-01.parquet"


def turn_labels(file: Path) -> None:
    """Every label the other way round, written as a person would: the metadata are copied, rows and groups stay."""
    before = pq.ParquetFile(file).metadata
    change_column(file, "label", lambda rows: [[1 - label for label in row] for row in rows])
    after = pq.ParquetFile(file).metadata
    assert (after.num_rows, after.num_row_groups) == (before.num_rows, before.num_row_groups)


def test_a_resume_with_turned_labels_is_refused(tmp_path: Path) -> None:
    mine = make_places(tmp_path)
    settings = mine.settings(run__name="r", train__max_steps=3)
    train(load_config(settings=settings), SoloComm())
    again = [*settings, "run.resume=latest", "train.max_steps=4"]
    open_run(load_config(settings=again), SoloComm()).close()
    for file in (tmp_path / "samples" / "train").iterdir():
        turn_labels(file)
    with pytest.raises(CheckpointError, match=r"'\w+' here, '\w+' in .*: these are other training samples"):
        train(load_config(settings=again), SoloComm())


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Samples of long ago."""
    folder = make_places(tmp_path).folder / "samples"
    for file in folder.glob("*/*.parquet"):
        os.utime(file, (OLD_S, OLD_S))
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read, in order."""
    files: list[str] = []
    work = content.digest_of
    monkeypatch.setattr(content, "digest_of", lambda storage, file: files.append(file) or work(storage, file))
    return files


def digest(samples: str | Path, memory: Path, split: str = "train", days: list[str] | None = None) -> str:
    comm = SoloComm()
    return samples_digest(comm, open_index(comm, str(samples), split, load_schema(), days), memory)


def test_known_files_are_read_once_where_no_other_may_have_written(
    samples: Path, read: list[str], tmp_path: Path
) -> None:
    """Whatever the umask: what this user keeps is for this user alone."""
    before = os.umask(0)
    try:
        first = digest(samples, tmp_path / "c")
    finally:
        os.umask(before)
    assert sorted(read) == [f"train/day=2026-01-0{day}.parquet" for day in (1, 2, 3)]
    (kept,) = (tmp_path / "c" / "samples").iterdir()
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "c", kept.parent, kept)] == [0o700, 0o700, 0o600]
    for mode, again in ((0o600, 0), (0o660, 3)):
        kept.chmod(mode)
        del read[:]
        assert digest(samples, tmp_path / "c") == first
        assert len(read) == again
    assert digest(samples, tmp_path / "other") == first


def test_a_changed_file_is_read_though_its_size_and_time_are_the_old_ones(
    samples: Path, read: list[str], tmp_path: Path
) -> None:
    first = digest(samples, tmp_path / "c")
    file = samples / "train" / FIRST
    data = bytearray(file.read_bytes())
    data[len(data) // 4] ^= 1
    file.write_bytes(data)
    os.utime(file, (OLD_S, OLD_S))
    del read[:]
    assert digest(samples, tmp_path / "c") != first
    assert read == [f"train/{FIRST}"]


def test_a_file_of_this_moment_is_not_remembered(samples: Path, read: list[str], tmp_path: Path) -> None:
    os.utime(samples / "train" / FIRST)
    for _ in range(2):
        digest(samples, tmp_path / "c")
    assert read.count(f"train/{FIRST}") == 2 and len(read) == 4


def test_a_place_that_cannot_remember_does_no_harm(samples: Path, tmp_path: Path) -> None:
    first = digest(samples, tmp_path / "c")
    (memory,) = (tmp_path / "c" / "samples").iterdir()
    for text in ("", "[1]", '{"train/a": 1}', "\x00"):
        memory.write_text(text)
        assert digest(samples, tmp_path / "c") == first
    (tmp_path / "file").touch()
    assert digest(samples, tmp_path / "file") == first


def test_days_are_known_wherever_they_are(samples: Path, tmp_path: Path) -> None:
    days = ["2026-01-02", "2026-01-03"]
    first = digest(samples, tmp_path / "c", days=days)
    (samples / "train" / "day=2026-01-02.parquet").rename(samples / "test" / "day=2026-01-02.parquet")
    assert digest(samples, tmp_path / "c", "test", days) == first


def test_an_object_store_says_the_same_and_is_read_once(
    samples: Path, read: list[str], tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_SETTLED_S", -60.0)
    there = Storage(s3_url)
    for file in samples.glob("*/*.parquet"):
        there.write_bytes(f"{file.parent.name}/{file.name}", file.read_bytes())
    expected = digest(samples, tmp_path / "c")
    for number in (6, 6):
        assert digest(s3_url, tmp_path / "c") == expected
        assert len(read) == number
    local = Path(shutil.copy(samples / "train" / FIRST, tmp_path))
    turn_labels(local)
    there.write_bytes(f"train/{FIRST}", local.read_bytes())
    assert digest(s3_url, tmp_path / "c") != expected
    assert len(read) == 7
