"""tools/real_logs.py on a few rows in the form of each log, up to the samples."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.build_samples import app as build_samples
from tests.cli import invoke
from tools.real_logs import DAY_S, KINDS, SPREAD_START_S, Events, app, spread


def _lines(path: Path, rows: list[str]) -> None:
    path.write_text("\n".join(rows) + "\n")


def _movielens(folder: Path) -> None:
    """Two users: one rates 25 movies in a row, the other two, an hour apart."""
    rated = [(1, n, 1 + (n - 1) % 5, 880_000_000 + 10 * n) for n in range(1, 26)]
    rated += [(2, 1, 4, 880_000_000), (2, 2, 3, 880_003_600)]
    _lines(folder / "u.data", ["\t".join(map(str, row)) for row in rated])
    _lines(folder / "u.genre", ["Action|0", "Drama|1", ""])
    _lines(folder / "u.item", [f'{n}|Movie, or "{n}"|||x|{n % 2}|{int(n % 3 == 0)}' for n in range(1, 26)])
    _lines(folder / "u.user", ["1|24|M|writer|1", "2|53|F|artist|2"])
    (folder / "posters").mkdir()
    (folder / "posters" / "3.jpg").touch()


def _movielens_small(folder: Path) -> None:
    rows = [f"{n % 4},{n},{n % 5 + 0.5},{880_000_000 + 40_000 * n}" for n in range(40)]
    _lines(folder / "ratings.csv", ["userId,movieId,rating,timestamp", *rows])
    _lines(folder / "movies.csv", ["movieId,title,genres", *(f'{n},"Movie, the",Action|Drama' for n in range(40))])


def _grocery(folder: Path) -> None:
    rows = [f"{n % 4}\t{n % 7}\t{1_300_000_000 + 86_400 * (n % 9)}" for n in range(60)]
    _lines(folder / "train.csv", ["user_id\titem_id\ttime", *rows])
    _lines(folder / "item_meta.csv", ["item_id\ti_category\tr_complement", *(f"{n}\t{n % 2}\t[1]" for n in range(7))])


def _frappe(folder: Path) -> None:
    names = "user\titem\tcnt\tdaytime\tweekday\tisweekend\thomework\tcost\tweather\tcountry\tcity"
    context = "1\tnight\tsunday\tweekend\thome\tfree\tsunny\tSpain\t0"
    _lines(folder / "frappe.csv", [names, *(f"{n % 4}\t{n % 7}\t{context}" for n in range(60))])
    _lines(folder / "meta.csv", ["item\tcategory\tdeveloper\tprice", *(f'{n}\tTools\t"Any\tFree' for n in range(6))])


def _checkins(folder: Path) -> None:
    rows = [(1 + n % 4, 1 + n % 7, 500 * n) for n in reversed(range(60))]
    np.save(folder / "NYC.npy", np.array(rows, np.int32))
    np.save(folder / "NYC_POI.npy", np.array([(n, 40.7 + n / 100, -74.0) for n in range(1, 8)]))


def _journey(folder: Path) -> None:
    number = np.arange(60)
    times = np.datetime64("2017-01-01T09", "ns") + number // 3 * np.timedelta64(2, "D")
    rows = {"household_id": number % 4, "store_id": number % 2, "basket_id": number // 3, "product_id": number % 7}
    kinds = {"product_category": ["SOUP"] * 7, "department": ["GROCERY"] * 7, "manufacturer_id": [1] * 7}
    users = {"household_id": [1, 2], "age": ["45-54", None], "income": ["35-49K", "50-74K"]}
    pq.write_table(pa.table({**rows, "transaction_timestamp": times}), folder / "transactions.parquet")
    pq.write_table(pa.table({"product_id": np.arange(7), **kinds}), folder / "products.parquet")
    pq.write_table(pa.table(users), folder / "demographics.parquet")


FILES: dict[str, Callable[[Path], None]] = {
    "movielens": _movielens,
    "movielens-small": _movielens_small,
    "grocery": _grocery,
    "frappe": _frappe,
    "checkins": _checkins,
    "journey": _journey,
}


def _made(kind: str, folder: Path) -> tuple[pa.Table, pa.Table]:
    (folder / "files").mkdir()
    FILES[kind](folder / "files")
    invoke(app, kind, folder / "files", "--out", folder / "log", code=0)
    return pq.read_table(folder / "log" / "impressions"), pq.read_table(folder / "log" / "behaviors")


def test_ratings_become_impressions_and_behaviours(tmp_path: Path) -> None:
    impressions, behaviors = _made("movielens", tmp_path)
    assert impressions.num_rows == 27
    assert pc.sum(impressions["label"]).as_py() == behaviors.num_rows == 11, "ratings of 4 and 5"
    counts = impressions.group_by("session").aggregate([([], "count_all")]).sort_by("session")["count_all"].to_pylist()
    assert counts == [20, 5, 1, 1], "a session ends after 20 ratings, with a pause, and with its user"
    assert impressions["category"].to_pylist()[:3] == ["1", "0", "3"], "bit 0: Action, bit 1: Drama"
    assert impressions["occupation"].to_pylist()[-1] == "artist"
    assert impressions["image"].to_pylist()[:4] == ["", "", "3.jpg", ""], "the movies with a poster"


def test_what_is_drawn_was_taken_by_others_and_not_in_the_session(tmp_path: Path) -> None:
    impressions, behaviors = _made("journey", tmp_path)
    assert behaviors.num_rows == pc.sum(impressions["label"]).as_py() == 14 * 3, "four weeks"
    rows = impressions.select(["user", "session", "item", "label"]).to_pylist()
    taken = {(row["user"], row["session"], row["item"]) for row in rows if row["label"]}
    drawn = [(row["user"], row["session"], row["item"]) for row in rows if not row["label"]]
    assert len(drawn) > 40
    assert not taken & set(drawn)


def test_times_are_spread_over_days_in_their_order() -> None:
    time_N = np.array([7, 3, 3, 1_000_000, 8, 9])
    nothing = np.zeros(6, np.int64)
    events = spread(Events(user_N=nothing, item_N=nothing, time_N=time_N, session_N=nothing, label_N=nothing), 3)
    assert ((events.time_N - SPREAD_START_S) // DAY_S).tolist() == [1, 0, 0, 2, 1, 2]
    assert (np.argsort(events.time_N, kind="stable") == np.argsort(time_N, kind="stable")).all()


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_made_of_each_log(kind: str, tmp_path: Path, connected: None) -> None:
    impressions, _ = _made(kind, tmp_path)
    mapping = yaml.safe_load((tmp_path / "log" / "mapping.yaml").read_text())["impressions"]
    for names in mapping.values():
        assert set(names) <= set(impressions.column_names)
    words = ["--logs", str(tmp_path / "log"), "--mapping", str(tmp_path / "log" / "mapping.yaml")]
    invoke(build_samples, *words, "--samples", tmp_path / "samples", "--test-days", "0", code=0)
    samples = pq.read_table(tmp_path / "samples" / "train", partitioning=None)
    assert pc.sum(pc.list_value_length(samples["label"])).as_py() > impressions.num_rows / 2
    assert {*mapping["user"], *(f"ad_{name}" for name in mapping["ad"])} <= set(samples.column_names)
