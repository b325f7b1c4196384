"""Changed samples are found out though names, sizes and counts are equal; known files are read once."""

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore.storage import storage
from featurestore.storage.storage import Storage
from tests.trainer.conftest import Places, make_places
from trainer.comm import SoloComm
from trainer.config import load_config
from trainer.errors import CheckpointError
from trainer.main import train
from trainer.runs.open import open_run
from trainer.samples import survey as content
from trainer.samples.index import SampleIndex, open_index
from trainer.samples.survey import samples_digest
from trainer.schema.fields import load_schema

OLD_S = 1_000_000_000
FIRST = "day=2026-01-01.parquet"


@pytest.fixture
def mine(tmp_path: Path) -> Places:
    return make_places(tmp_path)


def turn_labels(file: Path) -> None:
    """Every label the other way round, written as a person would: the metadata are copied, rows and groups stay."""
    before = pq.ParquetFile(file).metadata
    table = pq.read_table(file, partitioning=None)
    labels = pa.array([[1 - label for label in row] for row in table["label"].to_pylist()], pa.list_(pa.int8()))
    at = table.schema.get_field_index("label")
    pq.write_table(table.set_column(at, table.schema.field("label"), labels), file, row_group_size=7)
    after = pq.ParquetFile(file).metadata
    assert (after.num_rows, after.num_row_groups) == (before.num_rows, before.num_row_groups)


def index_of(samples: str | Path, split: str = "train", days: list[str] | None = None) -> SampleIndex:
    return open_index(SoloComm(), str(samples), split, load_schema(), days)


class TestTurnedLabels:
    def test_a_resume_is_refused(self, mine: Places) -> None:
        settings = mine.settings(run__name="r", train__max_steps=3)
        train(load_config(settings=settings), SoloComm())
        again = [*settings, "run.resume=latest", "train.max_steps=4"]
        open_run(load_config(settings=again), SoloComm()).close()
        for file in (mine.folder / "samples" / "train").iterdir():
            turn_labels(file)
        with pytest.raises(CheckpointError, match=r"'\w+' here, '\w+' in .*: these are other training samples"):
            train(load_config(settings=again), SoloComm())


class TestMemory:
    @pytest.fixture
    def samples(self, mine: Places) -> Path:
        for file in (mine.folder / "samples").glob("*/*.parquet"):
            os.utime(file, (OLD_S, OLD_S))
        folder: Path = mine.folder / "samples"
        return folder

    @pytest.fixture
    def read(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The files that were read, in order."""
        files: list[str] = []
        work = content.digest_of

        def noted(storage: Storage, file: str) -> str:
            files.append(file)
            return work(storage, file)

        monkeypatch.setattr(content, "digest_of", noted)
        return files

    def test_known_files_are_not_read_again(self, samples: Path, read: list[str], tmp_path: Path) -> None:
        first = samples_digest(SoloComm(), index_of(samples), tmp_path / "c")
        assert sorted(read) == [f"train/day=2026-01-0{day}.parquet" for day in (1, 2, 3)]
        del read[:]
        assert samples_digest(SoloComm(), index_of(samples), tmp_path / "c") == first
        assert samples_digest(SoloComm(), index_of(samples), tmp_path / "other") == first
        assert len(read) == 3
        assert (tmp_path / "c" / "samples").stat().st_mode & 0o777 == 0o700

    def test_what_others_may_have_written_is_not_believed(self, samples: Path, read: list[str], tmp_path: Path) -> None:
        """Whatever the umask: what this user keeps is for this user alone."""
        before = os.umask(0)
        try:
            samples_digest(SoloComm(), index_of(samples), tmp_path / "c")
        finally:
            os.umask(before)
        (kept,) = (tmp_path / "c" / "samples").iterdir()
        assert [path.stat().st_mode & 0o777 for path in (tmp_path / "c", kept)] == [0o700, 0o600]
        for mode, again in ((0o600, 0), (0o660, 3)):
            kept.chmod(mode)
            del read[:]
            samples_digest(SoloComm(), index_of(samples), tmp_path / "c")
            assert len(read) == again

    def test_a_changed_file_is_read_though_its_size_and_time_are_the_old_ones(
        self, samples: Path, read: list[str], tmp_path: Path
    ) -> None:
        first = samples_digest(SoloComm(), index_of(samples), tmp_path / "c")
        file = samples / "train" / FIRST
        size_bytes = file.stat().st_size
        with file.open("r+b") as stream:
            stream.seek(size_bytes // 4)
            byte = stream.read(1)
            stream.seek(size_bytes // 4)
            stream.write(bytes([byte[0] ^ 1]))
        os.utime(file, (OLD_S, OLD_S))
        del read[:]
        second = samples_digest(SoloComm(), index_of(samples), tmp_path / "c")
        assert read == [f"train/{FIRST}"]
        assert file.stat().st_size == size_bytes
        assert second != first

    def test_a_file_of_this_moment_is_not_remembered(self, samples: Path, read: list[str], tmp_path: Path) -> None:
        os.utime(samples / "train" / FIRST)
        for _ in range(2):
            samples_digest(SoloComm(), index_of(samples), tmp_path / "c")
        assert read.count(f"train/{FIRST}") == 2
        assert len(read) == 4

    def test_a_place_that_cannot_remember_does_no_harm(self, samples: Path, tmp_path: Path) -> None:
        first = samples_digest(SoloComm(), index_of(samples), tmp_path / "c")
        (memory,) = (tmp_path / "c" / "samples").iterdir()
        for text in ("", "[1]", '{"train/a": 1}', "\x00"):
            memory.write_text(text)
            assert samples_digest(SoloComm(), index_of(samples), tmp_path / "c") == first
        (tmp_path / "file").touch()
        assert samples_digest(SoloComm(), index_of(samples), tmp_path / "file") == first

    def test_days_are_known_wherever_they_are(self, samples: Path, read: list[str], tmp_path: Path) -> None:
        days = ["2026-01-02", "2026-01-03"]
        first = samples_digest(SoloComm(), index_of(samples, days=days), tmp_path / "c")
        (samples / "train" / "day=2026-01-02.parquet").rename(samples / "test" / "day=2026-01-02.parquet")
        assert samples_digest(SoloComm(), index_of(samples, "test", days), tmp_path / "c") == first

    def test_an_object_store_says_the_same_and_is_read_once(
        self, samples: Path, read: list[str], tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(storage, "_SETTLED_S", -60.0)
        there = Storage(s3_url)
        for file in samples.glob("*/*.parquet"):
            there.write_bytes(f"{file.parent.name}/{file.name}", file.read_bytes())
        expected = samples_digest(SoloComm(), index_of(samples), tmp_path / "c")
        for number in (6, 6):
            assert samples_digest(SoloComm(), index_of(s3_url), tmp_path / "c") == expected
            assert len(read) == number
        local = tmp_path / FIRST
        shutil.copy(samples / "train" / FIRST, local)
        turn_labels(local)
        there.write_bytes(f"train/{FIRST}", local.read_bytes())
        assert samples_digest(SoloComm(), index_of(s3_url), tmp_path / "c") != expected
        assert len(read) == 7
