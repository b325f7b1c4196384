"""Days added to samples: the bytes of samples made anew, whatever crosses midnight, and other files as they were."""

import dataclasses
import itertools
import json
import random
import threading
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client

from featurestore.published.versions import open_published
from pipeline.errors import SampleError, SampleOptionError
from pipeline.options import SampleOptions
from pipeline.samples.added import add_days
from pipeline.samples.build import build_samples
from pipeline.samples.logs import BEHAVIORS, IMPRESSIONS
from tests.pipeline.samples.rows import (
    DAY_S,
    START_S,
    Row,
    all_bytes,
    behavior_items,
    day_of,
    done,
    in_pieces,
    random_logs,
    read,
    shown,
    table,
    write,
)
from trainer.comm import SoloComm
from trainer.errors import DataError
from trainer.runs.open import PartReader
from trainer.samples.index import SampleIndex, open_index, read_row_groups
from trainer.samples.survey import samples_digest
from trainer.schema.fields import Schema, days_of_file, file_of_month, load_schema

FIRST = "2026-01-"


def write_until(folder: Path, rng: random.Random, impressions: list[Row], behaviors: list[Row], day: int) -> None:
    """Write what is known at the end of a day: logs of any file and order."""
    for file in folder.glob("*/*"):
        file.unlink()
    known = [[row for row in rows if day_of(row) <= day] for rows in (impressions, behaviors)]
    write(folder, *(in_pieces(rng, rows) for rows in known))


def bytes_at(url: str) -> dict[str, bytes]:
    """Read every Parquet file of samples on S3."""
    storage = open_published(url)
    return {each.path: storage.read_bytes(each.path) for each in storage.entries() if each.path.endswith(".parquet")}


FOR_TESTING: dict[str, dict[str, Any]] = {
    "0": {"test_days": 0},
    "2": {"test_days": 2},
    "from": {"test_days": 1, "test_from": "2026-01-12"},
    "share": {"test_days": 1, "test_share": 0.3},
}
SOME = [(0, "0", "disk"), (1, "from", "disk"), (2, "share", "disk"), (0, "2", "s3")]
REST = [case for case in itertools.product(range(12), ("0", "2"), ("disk", "s3")) if case not in SOME]


@pytest.mark.long
@pytest.mark.parametrize(
    ("seed", "for_testing", "place"), [*SOME, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]
)
def test_a_day_after_the_other_gives_the_bytes_of_a_rebuild(
    options: SampleOptions,
    client: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    seed: int,
    for_testing: str,
    place: str,
) -> None:
    """Sessions go on over midnights, some for days; at the end, late rows of one day. Most cases are slow."""
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
        way = {"since": FIRST + "01"} if rng.random() < 0.5 else {"days": f"{FIRST}{day + 1:02}"}
        if way == {"since": FIRST + "01"} or any(day_of(row) == day for row in early):
            try:
                add_days(SampleOptions(samples=options.samples, scratch=options.scratch, **way), client)
            except SampleError as error:  # all of the day's rows are of groups of the day before
                assert "no group begins on" in str(error)
                add_days(SampleOptions(samples=options.samples, since=FIRST + "01"), client)
    write_until(tmp_path / "logs", rng, impressions, behaviors, last)
    add_days(SampleOptions(samples=options.samples, days=f"{FIRST}{days[-3] + 1:02}"), client)
    found = bytes_at(options.samples) if place == "s3" else all_bytes(options.samples)
    build_samples(dataclasses.replace(options, samples=str(tmp_path / "anew")), client)
    expected = all_bytes(str(tmp_path / "anew"))
    assert found.keys() == expected.keys()
    assert [name for name in expected if name != "quarantine.parquet" and found[name] != expected[name]] == []


@pytest.fixture
def made(options: SampleOptions, client: Client, tmp_path: Path) -> SampleOptions:
    """Samples of four days, a user each, with behaviours of the day before."""
    impressions = [shown(day * DAY_S + 9_000 + user, user=user) for day in range(4) for user in range(5)]
    behaviors = [done(day * DAY_S + user, user=user, item=day) for day in range(4) for user in range(5)]
    write(tmp_path / "logs", [table(impressions)], [table(behaviors)])
    build_samples(dataclasses.replace(options, test_days=1), client)
    return options


def labels_of(index: SampleIndex, schema: Schema) -> list[list[float]]:
    """Read the labels of all batches, as an evaluation does."""
    return [each.label_B.tolist() for each in PartReader(index, schema, batch_size=4).batches()]


class TestAddDays:
    def test_other_files_stay_and_the_last_days_are_for_testing(
        self, made: SampleOptions, client: Client, tmp_path: Path
    ) -> None:
        before = {path.name: path.stat().st_ino for path in Path(made.samples).glob("*/*.parquet")}
        write(
            tmp_path / "logs",
            [table([shown(day * DAY_S + 9_000) for day in range(4)]), table([shown(4 * DAY_S + 9_000)])],
            [table([done(0)])],
        )
        summary = add_days(SampleOptions(samples=made.samples, days="2026-01-05"), client)
        assert (summary["days"], summary["groups"]) == (["2026-01-05"], 1)
        after = {path.name: path.stat().st_ino for path in Path(made.samples).glob("*/*.parquet")}
        assert {name: after[name] for name in before} == before
        test = [path.name for path in Path(made.samples, "test").iterdir()]
        assert test == ["day=2026-01-05-000.parquet"]

    def test_only_the_window_is_read(
        self, made: SampleOptions, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
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
        options = SampleOptions(samples=made.samples, days="2026-01-04")
        assert add_days(options, client)["groups"] == 5
        first = START_S // DAY_S
        assert read[IMPRESSIONS] == {first + 3}
        impressions = [
            *(shown(2 * DAY_S + 9_000 + user, user=user, session=9) for user in range(5)),
            *(shown(3 * DAY_S + at_s, user=1, session=9) for at_s in range(-8_000, 3_000, 1_000)),
            shown(3 * DAY_S + 9_000, user=3),
        ]
        write(tmp_path / "logs", [table(impressions)], [table([done(0, user=2), done(1, user=1)])])
        for each in (*read.values(), *users.values()):
            each.clear()
        assert add_days(options, client)["days"] == ["2026-01-03", "2026-01-04"]  # a session goes on
        assert read == {IMPRESSIONS: {first + 2, first + 3}, BEHAVIORS: {first}}
        assert users == {IMPRESSIONS: {0, 1, 2, 3, 4}, BEHAVIORS: {1, 2}}

    def test_a_group_of_the_day_before_has_all_of_its_window(
        self, options: SampleOptions, client: Client, tmp_path: Path
    ) -> None:
        """It begins at that day's midnight and goes on into the new day; its window is no whole number of seconds."""
        options = dataclasses.replace(options, window_days=0.33333, test_days=0)
        earlier = [shown(at_s) for at_s in (DAY_S, 2 * DAY_S, 3 * DAY_S - 600)]
        behaviors = [done(2 * DAY_S - 28_800, item=8), done(2 * DAY_S - 28_801, item=9)]
        write(tmp_path / "logs", [table(earlier)], [table(behaviors)])
        build_samples(options, client)
        write(tmp_path / "logs", [table([*earlier, shown(3 * DAY_S + 300), shown(3 * DAY_S, user=2)])], [])
        assert add_days(SampleOptions(samples=options.samples, days="2026-01-04"), client)["groups"] == 2
        assert behavior_items(read(options.samples)) == [[], [8], []]

    def test_who_reads_finds_every_other_day_at_any_time(self, made: SampleOptions, client: Client) -> None:
        file, ended, reads = Path(made.samples, "train", "day=2026-01-02-000.parquet"), threading.Event(), []
        failures: list[OSError] = []

        def read() -> None:
            while not ended.is_set():
                try:
                    reads.append(file.read_bytes())
                except OSError as failure:
                    failures.append(failure)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            for _ in range(5):
                add_days(SampleOptions(samples=made.samples, days="2026-01-04"), client)
        finally:
            ended.set()
            reader.join()
        assert failures == [] and len(reads) > 100 and len(set(reads)) == 1

    def test_a_run_finds_its_test_day_where_that_is_for_training_by_now(
        self, made: SampleOptions, client: Client, tmp_path: Path
    ) -> None:
        """It opened the day in test/, and reads it when another day has taken its place there."""
        schema, comm = load_schema(), SoloComm()
        index = open_index(comm, made.samples, "test", schema)
        expected = (samples_digest(comm, index, tmp_path / "cache"), labels_of(index, schema))
        later = [table([shown(day * DAY_S + 9_000, user=day) for day in (4, 5)])]
        write(tmp_path / "logs", later, [table([done(0)])])
        add_days(SampleOptions(samples=made.samples, days="2026-01-05,2026-01-06"), client)
        assert index.row_groups[0].file == "test/day=2026-01-04-000.parquet"
        assert not Path(made.samples, index.row_groups[0].file).exists()
        assert (samples_digest(comm, index, tmp_path / "other"), labels_of(index, schema)) == expected
        Path(made.samples, "train", "day=2026-01-04-000.parquet").unlink()
        with pytest.raises(DataError, match=r"test/day=2026-01-04-000\.parquet is gone"):
            labels_of(index, schema)

    def test_nothing_is_missing(self, made: SampleOptions, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        """Which the footers of the logs tell."""
        monkeypatch.setattr("pipeline.samples.logs.read_piece", lambda *_: pytest.fail("a row was read"))
        before = all_bytes(made.samples)
        assert add_days(SampleOptions(samples=made.samples, since="2026-01-02"), client)["days"] == []
        assert all_bytes(made.samples) == before

    def test_missing_days_are_found_in_logs_whose_footers_tell_no_times(
        self, made: SampleOptions, client: Client, tmp_path: Path
    ) -> None:
        rows = table([shown(day * DAY_S + 9_000) for day in range(7) if day != 5])
        pq.write_table(rows, tmp_path / "logs" / "impressions" / "day=00.parquet", write_statistics=False)
        made_days = add_days(SampleOptions(samples=made.samples, since="2026-01-02"), client)["days"]
        assert made_days == ["2026-01-05", "2026-01-07"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"days": "2026-01-09"}, "no impressions on 2026-01-09"),
            ({"days": "yesterday"}, "--days yesterday: write days as 2026-03-20"),
            ({"days": "2026-01-04", "since": "2026-01-02"}, "give one of --days and --since"),
            ({"days": "2026-01-04", "max_behaviors": 3}, "--max-behaviors 3: .* was made with 50"),
        ],
    )
    def test_what_cannot_be_is_refused(
        self, made: SampleOptions, client: Client, changes: dict[str, Any], message: str
    ) -> None:
        before = all_bytes(made.samples)
        with pytest.raises((SampleError, SampleOptionError), match=message):
            add_days(SampleOptions(samples=made.samples, **changes), client)
        assert all_bytes(made.samples) == before

    def test_days_with_other_columns_than_those_that_stay_are_refused(
        self, made: SampleOptions, client: Client
    ) -> None:
        """As samples of another version may have them, or own tables whose types have changed."""
        file = Path(made.samples, "train", "day=2026-01-01-000.parquet")
        rows = pq.read_table(file, partitioning=None)
        pq.write_table(rows.append_column("more", rows["user"]).drop_columns("day"), file)
        before = all_bytes(made.samples)
        with pytest.raises(SampleError, match=r"\(user, .* day, .*\) are not those of .*2026-01-01.* \(.*, more\)"):
            add_days(SampleOptions(samples=made.samples, days="2026-01-04"), client)
        assert all_bytes(made.samples) == before

    def test_bad_rows_of_a_day_join_those_that_are_there(
        self, options: SampleOptions, client: Client, tmp_path: Path
    ) -> None:
        """Once, however often the day is made; without bad rows the file stays."""
        days = [table([shown(day * DAY_S + 9_000), shown(day * DAY_S + 9_001, label=day + 2)]) for day in range(2)]
        days.append(table([shown(2 * DAY_S + 9_000, image="new.jpg")]))

        def reasons() -> list[tuple[str, str]]:
            rows = pq.read_table(Path(options.samples, "quarantine.parquet")).to_pylist()
            return [(Path(row["file"]).name, row["reason"]) for row in rows]

        write(tmp_path / "logs", days[:1], [table([done(0)])])
        build_samples(options, client)
        first = reasons()
        write(tmp_path / "logs", days[:2], [])
        for _ in range(2):
            add_days(SampleOptions(samples=options.samples, days="2026-01-02"), client)
            both = reasons()
            assert both[:1] == first and [name for name, _ in both] == ["day=00.parquet", "day=01.parquet"]
        write(tmp_path / "logs", days, [])
        add_days(SampleOptions(samples=options.samples, days="2026-01-03"), client)
        assert reasons() == both
        named = pq.read_table(Path(options.samples, "images.parquet")).to_pylist()
        assert [row["key"] for row in named] == sorted(row["key"] for row in named)
        assert {row["uri"] for row in named} == {"5.jpg", "6.jpg", "new.jpg"}  # what the other days named is kept

    def test_samples_of_others_are_refused(self, client: Client, tmp_path: Path) -> None:
        options = {"options": {"window_days": 1}}
        forged = ({"added_days": ["../../x"]}, {"groups_of_file": {"../x": 1}}, {"groups_of_file": {"x": -1}})
        for summary in (None, {"options": ["window_days"]}, *(options | each for each in forged)):
            if summary is not None:
                (tmp_path / "summary.json").write_text(json.dumps(summary))
            with pytest.raises(SampleOptionError, match="has no samples that crossmedia samples made"):
                add_days(SampleOptions(samples=str(tmp_path), days="2026-01-04"), client)


def rows_of(samples: str, days: Sequence[str]) -> list[Row]:
    """Read the groups of some days, as a training on them does."""
    index = open_index(SoloComm(), samples, "train", load_schema(), days)
    tables = [part for _, part in read_row_groups(index.storage, index.row_groups, ["timestamp", "user", "ad_item"])]
    return pa.concat_tables(tables).to_pylist()


class TestDaysThatShareAFile:
    """Days 24 to 34, of two months; the last one is for testing."""

    DAYS = tuple(f"2026-01-{day}" for day in range(25, 32)) + tuple(f"2026-02-0{day}" for day in range(1, 5))
    ALONE = "day=2026-02-04-000.parquet"

    @pytest.fixture
    def shared(
        self, options: SampleOptions, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> SampleOptions:
        monkeypatch.setattr("pipeline.samples.groups.MANY_DAYS", 9)
        self._write(tmp_path, range(24, 35))
        build_samples(dataclasses.replace(options, test_days=1), client)
        return options

    @staticmethod
    def _write(folder: Path, days: Iterable[int], **changes: Any) -> None:
        rows = [shown(day * DAY_S + 9_000 + user, user=user, **changes) for day in days for user in range(day % 3 + 1)]
        write(folder / "logs", [table(rows)], [table([done(day * DAY_S, user=1) for day in range(24, 34)])])

    def _files(self, options: SampleOptions, split: str = "train") -> list[str]:
        return sorted(path.name for path in Path(options.samples, split).iterdir())

    def test_a_day_is_read_as_from_a_file_of_its_own(
        self, shared: SampleOptions, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.samples.groups.MANY_DAYS", 100)
        alone = dataclasses.replace(shared, samples=str(tmp_path / "alone"), test_days=1)
        build_samples(alone, client)
        assert self._files(shared) == ["days=2026-01-7f000000.parquet", "days=2026-02-00000007.parquet"]
        assert self._files(shared, "test") == [self.ALONE] and len(self._files(alone)) == 10
        for days in [*([day] for day in self.DAYS), self.DAYS[3:9], self.DAYS]:
            assert rows_of(shared.samples, days) == rows_of(alone.samples, days) != []
        counts = [json.loads(Path(each.samples, "summary.json").read_text())["train"] for each in (shared, alone)]
        assert [each.pop("files") for each in counts] == [2, 10] and counts[0] == counts[1]
        index = open_index(SoloComm(), shared.samples, "train", load_schema(), self.DAYS[:4])
        assert index.newest_day == date(2026, 1, 28)

    def test_a_day_that_is_made_leaves_the_others(self, shared: SampleOptions, client: Client, tmp_path: Path) -> None:
        before, inodes = rows_of(shared.samples, self.DAYS), self._inodes(shared)
        self._write(tmp_path, range(24, 35), item=2)
        add_days(SampleOptions(samples=shared.samples, days=self.DAYS[2]), client)
        files = [f"day={day}-000.parquet" for day in self.DAYS[:7]]
        assert self._files(shared) == [*files, "days=2026-02-00000007.parquet"]
        assert self._inodes(shared)["days=2026-02-00000007.parquet"] == inodes["days=2026-02-00000007.parquet"]
        after = rows_of(shared.samples, self.DAYS)
        made = {row["timestamp"] for row in rows_of(shared.samples, self.DAYS[2:3])}
        assert [row for row in after if row not in before] == [row for row in after if row["timestamp"] in made] != []
        recorded = json.loads(Path(shared.samples, "summary.json").read_text())
        assert (recorded["train"]["days"], recorded["train"]["groups"]) == (10, len(after) - recorded["test"]["groups"])

    def test_a_day_that_is_added_is_alone(self, shared: SampleOptions, client: Client, tmp_path: Path) -> None:
        inodes = self._inodes(shared)
        self._write(tmp_path, range(24, 36))
        assert add_days(SampleOptions(samples=shared.samples, since="2026-01-25"), client)["days"] == ["2026-02-05"]
        assert self._files(shared, "test") == ["day=2026-02-05-000.parquet"]
        assert self._inodes(shared).items() >= inodes.items() and self.ALONE in self._files(shared)

    def test_days_that_become_test_days_leave_the_others(
        self, shared: SampleOptions, client: Client, tmp_path: Path, options: SampleOptions
    ) -> None:
        by_share = dataclasses.replace(
            options, samples=str(tmp_path / "share"), test_days=SampleOptions.test_days, test_share=0.1
        )
        build_samples(by_share, client)
        before = rows_of(by_share.samples, self.DAYS[1:])
        assert self._files(by_share)[-1] == "days=2026-02-00000003.parquet" and len(self._files(by_share, "test")) == 2
        rows = [shown(24 * DAY_S + 9_000, user=user) for user in range(1, 31)]
        write(tmp_path / "logs", [table(rows)], [table([done(0)])])
        add_days(SampleOptions(samples=by_share.samples, days=self.DAYS[0]), client)
        assert len(self._files(by_share, "test")) == 3
        assert rows_of(by_share.samples, self.DAYS[1:]) == before

    def test_a_damaged_file_is_named(self, shared: SampleOptions, client: Client) -> None:
        Path(shared.samples, "train/days=2026-01-7f000000.parquet").write_bytes(b"PAR1")
        with pytest.raises(SampleError, match=r"days=2026-01-7f000000\.parquet: cannot be read"):
            add_days(SampleOptions(samples=shared.samples, days=self.DAYS[2]), client)

    @staticmethod
    def _inodes(options: SampleOptions) -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in Path(options.samples).glob("*/*.parquet")}


@pytest.mark.parametrize("days", [["2026-01-01"], ["2026-01-31"], ["2024-02-01", "2024-02-29"]])
def test_names_of_files_have_their_days(days: list[str]) -> None:
    assert days_of_file(file_of_month(days)) == days
    assert days_of_file(f"day={days[0]}-003.parquet") == days_of_file(f"day={days[0]}.parquet") == days[:1]
    assert days_of_file("part-0.parquet") == days_of_file("day=2026-01-011.parquet") == []
