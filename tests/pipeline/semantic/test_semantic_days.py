"""Semantic IDs of samples that get more days: the bytes of a whole rewrite, and only what is new is written."""

import re
import shutil

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from featurestore.format.rows import FeatureRows
from featurestore.published.versions import open_published
from featurestore.store import FeatureStore
from jobs.build_semantic_ids import app
from tests.jobs.semantic import (
    CODES,
    LEVELS,
    NUM_IMAGES,
    draw_features,
    make_place,
    run,
    with_samples,
)

EVERYWHERE = pytest.mark.parametrize("rewrite", ["disk", "s3"], indirect=True)
ON_DISK = pytest.mark.parametrize("rewrite", ["disk", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
"""What stays is decided by the same code for both: two tests that find, add, move and replace files are for S3."""


@pytest.fixture
def place(tmp_path, monkeypatch):
    return make_place(tmp_path, monkeypatch)


class TestFilesThatStay:
    """With the codebook that is there: what a whole rewrite would write, and nothing written that is there already."""

    @pytest.fixture
    def rewrite(self, request, place):
        """Runs the job into a folder or an address; gives how many files were written, and all Parquet files."""
        on_s3 = request.param == "s3"
        codebook = place / "codebook.safetensors"
        run(place, *with_samples(place), out="first")
        shutil.copy(place / "first" / "codebook.safetensors", codebook)
        out = f"{request.getfixturevalue('s3_url')}/sid" if on_s3 else str(place / "sid")

        def written(*args, out=out):
            options = ["--levels", str(LEVELS), "--codes", str(CODES), "--codebook", str(codebook)]
            result = CliRunner().invoke(app, [*options, "--out", out, *map(str, args or with_samples(place))])
            assert result.exit_code == 0, result.output
            count = int(re.search(r"(\d+) of \d+ files written", " ".join(result.output.split()))[1])
            storage = open_published(out)
            names = [each.path for each in storage.entries() if each.path.endswith((".parquet", ".yaml"))]
            return count, {name: storage.read_bytes(name).replace(out.encode(), b"OUT") for name in names}

        written()
        self.anew = lambda *args: written(*args, out=str(place / "anew"))[1]
        return written

    def check(self, rewrite, place, count, *args):
        shutil.rmtree(place / "anew", ignore_errors=True)
        found, files = rewrite(*args)
        expected = self.anew(*args)
        assert files.keys() == expected.keys()
        assert [name for name in files if files[name] != expected[name]] == []
        assert found == count

    @ON_DISK
    def test_nothing_has_changed(self, rewrite, place):
        self.check(rewrite, place, 0)

    @EVERYWHERE
    def test_a_new_day_and_one_that_moves(self, rewrite, place):
        (place / "samples" / "test" / "a.parquet").rename(place / "samples" / "train" / "b.parquet")
        self.check(rewrite, place, 1)
        shutil.copy(place / "samples" / "train" / "a.parquet", place / "samples" / "test" / "c.parquet")
        self.check(rewrite, place, 1)
        (place / "samples" / "test" / "c.parquet").rename(place / "samples" / "train" / "c.parquet")
        shutil.copy(place / "samples" / "train" / "b.parquet", place / "samples" / "test" / "d.parquet")
        self.check(rewrite, place, 1)

    @ON_DISK
    def test_a_file_with_other_rows(self, rewrite, place):
        file = place / "samples" / "train" / "a.parquet"
        pq.write_table(pq.read_table(file, partitioning=None).slice(3), file, row_group_size=7)
        self.check(rewrite, place, 1)

    @ON_DISK
    def test_a_copy_with_equal_bytes(self, rewrite, place):
        file = place / "samples" / "train" / "a.parquet"
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data)
        self.check(rewrite, place, 0)

    @ON_DISK
    def test_an_image_that_has_a_code_now(self, rewrite, place):
        """7 is in both files, and was in no store."""
        FeatureStore.open(place / "store").put(FeatureRows.of(["seven.jpg"], draw_features()[:1], keys=[7]))
        self.check(rewrite, place, 2)

    @ON_DISK
    def test_an_image_that_no_sample_has(self, rewrite, place):
        FeatureStore.open(place / "store").put(FeatureRows.of(["new.jpg"], draw_features()[:1], keys=[9_999]))
        self.check(rewrite, place, 0)

    @ON_DISK
    def test_an_image_with_another_code(self, rewrite, place):
        """Only in the file that has it."""
        keys = {}
        for split in ("train", "test"):
            table = pq.read_table(place / "samples" / split / "a.parquet")
            keys[split] = {
                key for name in ("behavior_image", "ad_image") for row in table[name].to_pylist() for key in row
            }
        key = min(keys["train"] - keys["test"] - {7, 101, 105})
        other = (key - 100 + 1) % NUM_IMAGES
        rows = FeatureRows.of([f"{key - 100}.jpg"], draw_features()[other : other + 1], keys=[key])
        FeatureStore.open(place / "store").put(rows)
        self.check(rewrite, place, 1)

    @EVERYWHERE
    def test_another_codebook_writes_all(self, rewrite, place):
        run(place, *with_samples(place), "--seed", 5, out="first")
        shutil.copy(place / "first" / "codebook.safetensors", place / "codebook.safetensors")
        self.check(rewrite, place, 2)


def test_the_codebook_of_an_address_is_read_there(place, s3_url):
    """As the line for cron has it, where places are on S3."""
    out = f"{s3_url}/sid"

    def written(*args, code=0):
        options = ["--out", out, "--levels", str(LEVELS), "--codes", str(CODES), *map(str, with_samples(place))]
        result = CliRunner().invoke(app, [*options, *args])
        assert result.exit_code == code, result.output
        return " ".join(result.output.split())

    assert "2 of 2 files written" in written()
    book = open_published(out).read_bytes("codebook.safetensors")
    assert "0 of 2 files written" in written("--codebook", f"{out}/codebook.safetensors")
    assert open_published(out).read_bytes("codebook.safetensors") == book
    nowhere = f"{s3_url}/none/codebook.safetensors"
    assert f"{nowhere} is no codebook of this job" in written("--codebook", nowhere, code=1)
