"""tools/movielens_logs.py on a few ratings in the form of MovieLens-100K."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tools.movielens_logs import app


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two people: one rates 25 movies in a row, the other two, an hour apart."""
    folder = tmp_path / "data"
    folder.mkdir()
    user, movie = [1] * 25 + [2, 2], [*range(1, 26), 1, 2]
    time = [880_000_000 + 10 * number for number in range(25)] + [880_000_000, 880_003_600]
    rating = [1 + number % 5 for number in range(25)] + [4, 3]
    ratings = pa.table({"user_id": user, "movie_id": movie, "rating": rating, "timestamp": time})
    named = {name: [""] * 25 for name in ("movie_title", "release_date", "video_release_date", "IMDb_URL")}
    genres = {"Action": np.arange(25) % 2, "Drama": np.arange(25) % 3 == 0}
    items = pa.table(
        {"movie_id": list(range(1, 26)), **named, **{name: bits.astype(int) for name, bits in genres.items()}}
    )
    users = pa.table({"user_id": [1, 2], "age": [24, 53], "gender": ["M", "F"], "occupation": ["writer", "artist"]})
    for name, table in {"data": ratings, "items": items, "users": users}.items():
        pq.write_table(table, folder / f"MovieLens100k_{name}.parquet.brotli", compression="brotli")
    return folder


def test_ratings_become_impressions_and_behaviours(files: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(files), "--out", str(tmp_path / "logs")])
    assert result.exit_code == 0, result.output
    impressions = pq.read_table(tmp_path / "logs" / "impressions")
    behaviors = pq.read_table(tmp_path / "logs" / "behaviors")
    assert impressions.num_rows == 27
    assert sum(impressions["label"].to_pylist()) == behaviors.num_rows == 11, "ratings of 4 and 5"
    counts = impressions.group_by("session").aggregate([([], "count_all")]).sort_by("session")["count_all"].to_pylist()
    assert counts == [20, 5, 1, 1], "a session ends after 20 ratings, with a pause, and with its user"
    assert impressions["category"].to_pylist()[:4] == [2, 1, 0, 3], "bit 0: Action, bit 1: Drama"
    assert impressions["user_occupation"].to_pylist()[-1] == 0, "artist comes before writer"


def test_missing_files_are_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(tmp_path), "--out", str(tmp_path / "logs")])
    assert result.exit_code == 1
    assert "MovieLens100k_data.parquet.brotli" in result.stderr
