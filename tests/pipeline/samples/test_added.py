"""Days added to samples: the bytes of rebuilt samples, whatever crosses midnight, and other files as they were."""

import dataclasses
import itertools
import json
import random
import re
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client

from pipeline.errors import SampleError, SampleOptionError
from pipeline.options import SampleOptions
from pipeline.problems import Problem
from pipeline.samples.added import add_days
from pipeline.samples.build import build_samples
from pipeline.samples.logs import BEHAVIORS, IMPRESSIONS
from tests.pipeline.samples.rows import (
    DAY_S,
    START_S,
    Call,
    Row,
    all_bytes,
    behavior_items,
    day_of,
    done,
    quarantine,
    random_logs,
    read,
    shown,
    table,
    users_of_days,
    write,
    write_in_pieces,
)
from tests.raised import compare, raises
from trainer.comm import SoloComm
from trainer.errors import DataError
from trainer.problems import Problem as TrainerProblem
from trainer.runs.open import PartReader
from trainer.samples.index import SampleIndex, open_index, read_row_groups
from trainer.samples.survey import samples_digest
from trainer.schema.fields import Schema, days_of_file, file_of_month, load_schema


def write_until(folder: Path, rng: random.Random, impressions: list[Row], behaviors: list[Row], day: int) -> None:
    """Write what is known at the end of a day: logs of any file and order."""
    write_in_pieces(folder, rng, *([row for row in rows if day_of(row) <= day] for rows in (impressions, behaviors)))


FOR_TESTING: dict[str, dict[str, Any]] = {
    "0": {"test_days": 0},
    "2": {"test_days": 2},
    "from": {"test_days": 1, "test_from": "2026-01-12"},
    "share": {"test_days": 1, "test_share": 0.3},
}
OTHER_LIMIT = {"where": "max-behaviors", "value": 3, "made": 50}
SOME = [(0, "0", "disk"), (1, "from", "disk"), (2, "share", "disk"), (0, "2", "s3")]
REST = [case for case in itertools.product(range(12), ("0", "2"), ("disk", "s3")) if case not in SOME]


@pytest.mark.long
@pytest.mark.parametrize(
    "case", [*SOME, *(pytest.param(case, marks=pytest.mark.slow) for case in REST)], ids="{0[0]}-{0[1]}-{0[2]}".format
)
def test_a_day_after_the_other_gives_the_bytes_of_a_rebuild(
    options: SampleOptions, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any, case: Any
) -> None:
    """Sessions go on over midnights, some for days; at the end, late rows of one day. Most cases are slow."""
    seed, for_testing, place = case
    rng = random.Random(seed)
    monkeypatch.setattr("pipeline.samples.groups.ROW_GROUP_SIZE", 2)  # so that a file has several
    impressions, behaviors = random_logs(rng)
    behaviors += [done(9 * DAY_S + 20_000, user=99, image=7)]
    for day in (12, 13, 14):  # a session that goes on for three days
        moments = range(day * DAY_S, (day + 1) * DAY_S, 3_500)
        impressions += [shown(at_s, user=99, session=5, user_age=1, image=7) for at_s in moments]
    last = max(map(day_of, impressions))
    days = sorted({day_of(row) for row in impressions})
    late = [row for row in impressions if day_of(row) == days[-3]][:2]
    early = [row for row in impressions if row not in late]
    options = dataclasses.replace(options, window_days=3, partitions=rng.choice([1, 4]), **FOR_TESTING[for_testing])
    if place == "s3":
        url, scratch = request.getfixturevalue("s3_url"), tmp_path / "scratch"
        options = dataclasses.replace(options, samples=url, scratch=str(scratch))
    write_until(tmp_path / "logs", rng, early, behaviors, days[len(days) // 3])
    build_samples(options, client)
    for day in days[len(days) // 3 + 1 :]:
        write_until(tmp_path / "logs", rng, early, behaviors, day)
        way = {"since": "2026-01-01"} if rng.random() < 0.5 else {"days": f"2026-01-{day + 1:02}"}
        if way == {"since": "2026-01-01"} or any(day_of(row) == day for row in early):
            try:
                add_days(SampleOptions(samples=options.samples, scratch=options.scratch, **way), client)
            except SampleError as error:  # all of the day's rows are of groups of the day before
                compare(error, Problem.NO_IMPRESSIONS)
                add_days(SampleOptions(samples=options.samples, since="2026-01-01"), client)
    write_until(tmp_path / "logs", rng, impressions, behaviors, last)
    add_days(SampleOptions(samples=options.samples, days=f"2026-01-{days[-3] + 1:02}"), client)
    found = all_bytes(options.samples)
    build_samples(dataclasses.replace(options, samples=str(tmp_path / "anew")), client)
    expected = all_bytes(tmp_path / "anew")
    assert found.keys() == expected.keys()
    assert [name for name in expected if name != "quarantine.parquet" and found[name] != expected[name]] == []


@pytest.fixture
def made(options: SampleOptions, build: Call) -> SampleOptions:
    """Samples of four days."""
    build(*users_of_days(4), test_days=1)
    return options


def labels_of(index: SampleIndex, schema: Schema) -> list[list[float]]:
    """Read the labels of all batches, as an evaluation does."""
    return [each.label_B.tolist() for each in PartReader(index, schema, batch_size=4).batches()]


def inodes(options: SampleOptions) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in Path(options.samples).glob("*/*.parquet")}


class TestAddDays:
    def test_other_files_stay_and_last_days_are_for_testing(self, made: SampleOptions, add: Call, log: Call) -> None:
        before = inodes(made)
        log([shown(day * DAY_S + 9_000) for day in range(5)], [done(0)])
        summary = add(days="2026-01-05")
        assert (summary["days"], summary["groups"]) == (["2026-01-05"], 1)
        assert inodes(made).items() > before.items()
        assert [path.name for path in Path(made.samples, "test").iterdir()] == ["day=2026-01-05-000.parquet"]

    @pytest.mark.usefixtures("made")
    def test_only_the_window_is_read(self, add: Call, log: Call, monkeypatch: pytest.MonkeyPatch) -> None:
        """Row groups before it are not, the day before only where rows are soon after midnight, and of the behaviours
        only those of the users of these days."""
        read: dict[str, set[int]] = {IMPRESSIONS: set(), BEHAVIORS: set()}
        users: dict[str, set[int]] = {IMPRESSIONS: set(), BEHAVIORS: set()}
        from pipeline.samples import logs

        original = logs.read_piece

        def noted(piece: Any, latest_s: int) -> Any:
            rows = original(piece, latest_s)
            read[piece.log] |= {int(t) // (DAY_S * 10**6) for t in rows.good["timestamp"]}
            users[piece.log] |= set(rows.good["user"].tolist())
            return rows

        monkeypatch.setattr(logs, "read_piece", noted)
        assert add(days="2026-01-04")["groups"] == 5
        first = START_S // DAY_S
        assert read[IMPRESSIONS] == {first + 3}
        impressions = [
            *(shown(2 * DAY_S + 9_000 + user, user=user, session=9) for user in range(5)),
            *(shown(3 * DAY_S + at_s, user=1, session=9) for at_s in range(-8_000, 3_000, 1_000)),
            shown(3 * DAY_S + 9_000, user=3),
        ]
        log(impressions, [done(0, user=2), done(1, user=1)])
        for each in (*read.values(), *users.values()):
            each.clear()
        assert add(days="2026-01-04")["days"] == ["2026-01-03", "2026-01-04"]  # a session goes on
        assert read == {IMPRESSIONS: {first + 2, first + 3}, BEHAVIORS: {first}}
        assert users == {IMPRESSIONS: {0, 1, 2, 3, 4}, BEHAVIORS: {1, 2}}

    def test_yesterdays_group_has_its_window(self, options: SampleOptions, build: Call, add: Call, log: Call) -> None:
        """It begins at that day's midnight and goes on into the new day; its window is no whole number of seconds."""
        earlier = [shown(at_s) for at_s in (DAY_S, 2 * DAY_S, 3 * DAY_S - 600)]
        behaviors = [done(2 * DAY_S - 28_800, item=8), done(2 * DAY_S - 28_801, item=9)]
        build(earlier, behaviors, window_days=0.33333)
        log([*earlier, shown(3 * DAY_S + 300), shown(3 * DAY_S, user=2)])
        assert add(days="2026-01-04")["groups"] == 2
        assert behavior_items(read(options.samples)) == [[], [8], []]

    def test_who_reads_finds_every_other_day_at_any_time(self, made: SampleOptions, add: Call) -> None:
        file, ended, reads = Path(made.samples, "train", "day=2026-01-02-000.parquet"), threading.Event(), list[bytes]()

        def read() -> None:
            while not ended.wait(0.002):
                reads.append(file.read_bytes())

        with ThreadPoolExecutor(1) as thread:
            reader = thread.submit(read)
            try:
                for _ in range(5):
                    add(days="2026-01-04")
            finally:
                ended.set()
            reader.result()
        assert len(reads) > 100 and len(set(reads)) == 1

    def test_a_run_finds_its_old_test_day(self, made: SampleOptions, add: Call, log: Call, tmp_path: Path) -> None:
        """It opened the day in test/, and reads it when another day has taken its place there."""
        schema, comm = load_schema(), SoloComm()
        index = open_index(comm, made.samples, "test", schema)
        expected = (samples_digest(comm, index, tmp_path / "cache"), labels_of(index, schema))
        log([shown(day * DAY_S + 9_000, user=day) for day in (4, 5)], [done(0)])
        add(days="2026-01-05,2026-01-06")
        assert index.row_groups[0].file == "test/day=2026-01-04-000.parquet"
        assert not Path(made.samples, index.row_groups[0].file).exists()
        assert (samples_digest(comm, index, tmp_path / "other"), labels_of(index, schema)) == expected
        Path(made.samples, "train", "day=2026-01-04-000.parquet").unlink()
        with raises(DataError, TrainerProblem.SAMPLES_GONE, where=f"{made.samples}/{index.row_groups[0].file}"):
            labels_of(index, schema)

    def test_missing_days_are_found_by_footers_or_times(
        self, made: SampleOptions, add: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = all_bytes(made.samples)
        with monkeypatch.context() as footers:
            footers.setattr("pipeline.samples.logs.read_piece", lambda *_: pytest.fail("a row was read"))
            assert add(since="2026-01-02")["days"] == []
        assert all_bytes(made.samples) == before
        rows = table([shown(day * DAY_S + 9_000) for day in range(7) if day != 5])
        pq.write_table(rows, tmp_path / "logs" / "impressions" / "day=00.parquet", write_statistics=False)
        assert add(since="2026-01-02")["days"] == ["2026-01-05", "2026-01-07"]

    @pytest.mark.parametrize(
        ("changes", "problem", "values"),
        [
            ({"days": "2026-01-09"}, Problem.NO_IMPRESSIONS, {"value": "2026-01-09"}),
            ({"days": "2026-01-04", "since": "2026-01-02"}, Problem.GIVE_ONE, {"where": "--days and --since"}),
            ({"days": "2026-01-04", "max_behaviors": 3}, Problem.OTHER_OPTION, OTHER_LIMIT),
        ],
    )
    def test_mistakes_are_told(
        self, made: SampleOptions, add: Call, changes: dict[str, Any], problem: Problem, values: dict[str, object]
    ) -> None:
        before = all_bytes(made.samples)
        with raises(SampleError, problem, **values):
            add(**changes)
        assert all_bytes(made.samples) == before

    def test_samples_of_others_are_refused(self, made: SampleOptions, add: Call, tmp_path: Path) -> None:
        """As samples of another version may have them, or own tables whose types have changed."""
        file = Path(made.samples, "train", "day=2026-01-01-000.parquet")
        rows = pq.read_table(file, partitioning=None)
        pq.write_table(rows.append_column("more", rows["user"]).drop_columns("day"), file)
        before = all_bytes(made.samples)
        value, where, wanted = map(re.compile, ("^user, .* day, ", "2026-01-01", ", more$"))
        with raises(SampleError, Problem.OTHER_COLUMNS, value=value, where=where, wanted=wanted):
            add(days="2026-01-04")
        assert all_bytes(made.samples) == before
        options = {"options": {"window_days": 1}}
        forged = ({"added_days": ["../../x"]}, {"groups_of_file": {"../x": 1}}, {"groups_of_file": {"x": -1}})
        for summary in (None, {"options": ["window_days"]}, *(options | each for each in forged)):
            if summary is not None:
                (tmp_path / "summary.json").write_text(json.dumps(summary))
            with raises(SampleOptionError, Problem.NOT_OUR_SAMPLES, where=tmp_path):
                add(samples=str(tmp_path), days="2026-01-04")

    def test_bad_rows_of_days_are_joined(
        self, options: SampleOptions, client: Client, add: Call, tmp_path: Path
    ) -> None:
        """Once, however often the day is made; without bad rows the file stays."""
        days = [[shown(day * DAY_S + 9_000), shown(day * DAY_S + 9_001, label=day + 2)] for day in range(2)]
        days.append([shown(2 * DAY_S + 9_000, image="new.jpg")])

        def reasons() -> list[tuple[str, str]]:
            return [(Path(file).name, reason) for file, _, reason in quarantine(tmp_path)]

        write(tmp_path / "logs", days[:1], [[done(0)]])
        build_samples(options, client)
        first = reasons()
        write(tmp_path / "logs", days[:2], [])
        for _ in range(2):
            add(days="2026-01-02")
            both = reasons()
            assert both[:1] == first and [name for name, _ in both] == ["day=00.parquet", "day=01.parquet"]
        write(tmp_path / "logs", days, [])
        add(days="2026-01-03")
        assert reasons() == both
        named = pq.read_table(Path(options.samples, "images.parquet")).to_pylist()
        assert [row["key"] for row in named] == sorted(row["key"] for row in named)
        assert {row["uri"] for row in named} == {"5.jpg", "6.jpg", "new.jpg"}  # what the other days named is kept


def rows_of(samples: str, days: Sequence[str]) -> list[Row]:
    """Read the groups of some days, as a training on them does."""
    index = open_index(SoloComm(), samples, "train", load_schema(), days)
    tables = [part for _, part in read_row_groups(index.storage, index.row_groups, ["timestamp", "user", "ad_item"])]
    return pa.concat_tables(tables).to_pylist()


class TestDaysThatShareAFile:
    """Days 24 to 34, of two months; the last one is for testing."""

    DAYS = tuple(f"2026-01-{day}" for day in range(25, 32)) + tuple(f"2026-02-0{day}" for day in range(1, 5))
    ALONE = "day=2026-02-04-000.parquet"
    FEBRUARY = "days=2026-02-00000007.parquet"

    @pytest.fixture
    def shared(
        self, options: SampleOptions, client: Client, log: Call, monkeypatch: pytest.MonkeyPatch
    ) -> SampleOptions:
        monkeypatch.setattr("pipeline.samples.groups.MANY_DAYS", 9)
        self._log(log, range(24, 35))
        build_samples(dataclasses.replace(options, test_days=1), client)
        return options

    @staticmethod
    def _log(log: Call, days: Iterable[int], **changes: Any) -> None:
        rows = [shown(day * DAY_S + 9_000 + user, user=user, **changes) for day in days for user in range(day % 3 + 1)]
        log(rows, [done(day * DAY_S, user=1) for day in range(24, 34)])

    def _files(self, options: SampleOptions, split: str = "train") -> list[str]:
        return sorted(path.name for path in Path(options.samples, split).iterdir())

    def test_a_day_is_read_as_from_a_file_of_its_own(
        self, shared: SampleOptions, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.samples.groups.MANY_DAYS", 100)
        alone = dataclasses.replace(shared, samples=str(tmp_path / "alone"), test_days=1)
        build_samples(alone, client)
        assert self._files(shared) == ["days=2026-01-7f000000.parquet", self.FEBRUARY]
        assert self._files(shared, "test") == [self.ALONE] and len(self._files(alone)) == 10
        for days in [*([day] for day in self.DAYS), self.DAYS[3:9], self.DAYS]:
            assert rows_of(shared.samples, days) == rows_of(alone.samples, days) != []
        counts = [json.loads(Path(each.samples, "summary.json").read_text())["train"] for each in (shared, alone)]
        assert [each.pop("files") for each in counts] == [2, 10] and counts[0] == counts[1]
        index = open_index(SoloComm(), shared.samples, "train", load_schema(), self.DAYS[:4])
        assert index.newest_day == date(2026, 1, 28)

    def test_a_day_that_is_made_or_added_leaves_the_others(self, shared: SampleOptions, add: Call, log: Call) -> None:
        before, old = rows_of(shared.samples, self.DAYS), inodes(shared)
        self._log(log, range(24, 36))
        assert add(since="2026-01-25")["days"] == ["2026-02-05"]
        assert self._files(shared, "test") == ["day=2026-02-05-000.parquet"]
        assert inodes(shared).items() >= old.items() and self.ALONE in self._files(shared), "the new day is alone"
        self._log(log, range(24, 36), item=2)
        add(days=self.DAYS[2])
        assert self._files(shared) == [*(f"day={day}-000.parquet" for day in self.DAYS[:7]), self.ALONE, self.FEBRUARY]
        assert inodes(shared)[self.FEBRUARY] == old[self.FEBRUARY]
        after = rows_of(shared.samples, self.DAYS)
        made = {row["timestamp"] for row in rows_of(shared.samples, self.DAYS[2:3])}
        assert [row for row in after if row not in before] == [row for row in after if row["timestamp"] in made] != []
        recorded = json.loads(Path(shared.samples, "summary.json").read_text())
        assert (recorded["train"]["days"], recorded["train"]["groups"]) == (11, len(after))

    def test_new_test_days_leave_others(
        self, shared: SampleOptions, client: Client, add: Call, log: Call, tmp_path: Path
    ) -> None:
        by_share = dataclasses.replace(
            shared, samples=str(tmp_path / "share"), test_days=SampleOptions.test_days, test_share=0.1
        )
        build_samples(by_share, client)
        before = rows_of(by_share.samples, self.DAYS[1:])
        assert self._files(by_share)[-1] == "days=2026-02-00000003.parquet" and len(self._files(by_share, "test")) == 2
        Path(shared.samples, "train/days=2026-01-7f000000.parquet").write_bytes(b"PAR1")
        with raises(SampleError, Problem.REFUSED, action="read", where=re.compile(r"/days=2026-01-7f000000\.parquet$")):
            add(days=self.DAYS[2])
        log([shown(24 * DAY_S + 9_000, user=user) for user in range(1, 31)], [done(0)])
        add(samples=by_share.samples, days=self.DAYS[0])
        assert len(self._files(by_share, "test")) == 3
        assert rows_of(by_share.samples, self.DAYS[1:]) == before


def test_names_of_files_have_their_days() -> None:
    for days in (["2026-01-01"], ["2026-01-31"], ["2024-02-01", "2024-02-29"]):
        assert days_of_file(file_of_month(days)) == days
        assert days_of_file(f"day={days[0]}-003.parquet") == days_of_file(f"day={days[0]}.parquet") == days[:1]
    assert days_of_file("part-0.parquet") == days_of_file("day=2026-01-011.parquet") == []
