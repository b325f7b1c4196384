"""What a new day of samples costs over building all days anew, in one run on one cluster.

    python -m benchmarks.days [--dir DIR] [--json FILE]

Drawn logs of some days, a file for each: sessions of five impressions, behaviours of two weeks before the first day and
of every day since. All days are built, then the last one is added to samples of the days before it. Every file has to
have the bytes of the first build, or nothing is reported.
"""

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from benchmarks.report import Figure, JsonPath, write_report
from featurestore.console.commandline import CommandApp, run_app
from pipeline.errors import SampleError
from pipeline.options import SampleOptions

if TYPE_CHECKING:
    from distributed import Client

_FIRST = 20_500  # a day since 1970
_HISTORY_DAYS = 14
_DAY_S = 86_400
DEFAULT_FOLDER = Path("data/bench/days")

app = CommandApp(report=True, failures=(OSError,))


@app.command()
def main(
    folder: Annotated[Path, typer.Option("--dir", help="Where logs and samples are made.")] = DEFAULT_FOLDER,
    json_file: JsonPath = None,
    days: Annotated[int, typer.Option(help="With impressions.", min=3)] = 20,
    sessions: Annotated[int, typer.Option(help="Of five impressions, on each day.", min=10)] = 50_000,
    users: Annotated[int, typer.Option(min=10)] = 250_000,
    rounds: Annotated[int, typer.Option(help="Of both; medians count.", min=1)] = 3,
) -> None:
    """Build all days, then add the last one to the others; prints the figures."""
    from pipeline.cluster.tasks import connect

    for name in ("logs", "earlier", "all", "before", "added"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for day in range(-_HISTORY_DAYS, days):
        write_day(folder / "logs", day, sessions, users)
    with connect(workers=2, threads_per_worker=1) as client:
        figures = compare(folder, days, rounds, client)
    write_report(figures | {"days": days, "sessions_per_day": sessions, "users": users, "rounds": rounds}, json_file)


def write_day(logs: Path, day: int, sessions: int, users: int) -> None:
    """Write the impressions of a day, where it is not of the history, and three times as many behaviours."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw = np.random.default_rng([7, day + _HISTORY_DAYS])

    def rows(count: int) -> dict[str, Any]:
        items = draw.integers(0, 20_000, count)
        return {"item": items, "image": [f"{item}.jpg" for item in items], "category": items % 50}

    start_s, name = (_FIRST + day) * _DAY_S, f"day={day + _HISTORY_DAYS:03d}.parquet"
    done = 15 * sessions
    behaviors = {"timestamp": np.sort(start_s + draw.integers(0, _DAY_S, done)), "user": draw.integers(0, users, done)}
    tables = {"behaviors": behaviors | rows(done) | {"dwell_s": draw.integers(3, 60, done).astype(np.float64)}}
    if day >= 0:
        first_S = draw.integers(0, _DAY_S, sessions)
        shown = {
            "timestamp": start_s + np.repeat(first_S, 5) + np.tile(np.arange(5) * 60, sessions),
            "user": np.repeat(draw.integers(0, users, sessions), 5),
            "session": np.repeat(draw.integers(0, 2**40, sessions), 5),
            "scene": draw.integers(0, 5, 5 * sessions),
            "label": draw.integers(0, 2, 5 * sessions).astype(np.int8),
        }
        tables["impressions"] = shown | rows(5 * sessions)
    for log, columns in tables.items():
        (logs / log).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), logs / log / name)


def compare(folder: Path, days: int, rounds: int, client: "Client") -> dict[str, Figure]:
    """Measure seconds of all days and of the last one, medians of rounds. Raises SampleError where a file differs."""
    from pipeline.samples.added import add_days
    from pipeline.samples.build import build_samples

    options = SampleOptions(logs=str(folder / "logs"), samples=str(folder / "all"))
    earlier = folder / "earlier"
    for file in without_last_day(folder / "logs", days):
        (earlier / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, earlier / file.parent.name / file.name)
    before = replace(options, logs=str(earlier), samples=str(folder / "before"))
    build_samples(before, client)  # warms the workers up, too
    last_day = str(np.datetime64(_FIRST + days - 1, "D"))
    all_s, day_s, all_cpu_s, day_cpu_s = [], [], [], []
    for _ in range(rounds):
        start_s, start_cpu_s = time.perf_counter(), _cpu_s(client)
        build_samples(options, client)
        all_s.append(time.perf_counter() - start_s)
        all_cpu_s.append(_cpu_s(client) - start_cpu_s)

        shutil.rmtree(folder / "added", ignore_errors=True)
        shutil.copytree(before.samples, folder / "added")
        start_s, start_cpu_s = time.perf_counter(), _cpu_s(client)
        made = add_days(SampleOptions(logs=options.logs, samples=str(folder / "added"), days=last_day), client)
        day_s.append(time.perf_counter() - start_s)
        day_cpu_s.append(_cpu_s(client) - start_cpu_s)
        for file in (folder / "all").glob("*/*.parquet"):
            if file.read_bytes() != (folder / "added" / file.relative_to(folder / "all")).read_bytes():
                raise SampleError(f"{file} differs from the one that was added")
    return {
        "day_share": median(day_s) / median(all_s),
        "all_days_s": median(all_s),
        "day_s": median(day_s),
        "day_cpu_share": median(day_cpu_s) / median(all_cpu_s),
        "all_days_cpu_s": median(all_cpu_s),
        "day_cpu_s": median(day_cpu_s),
        "days_written": len(made["days"]),
    }


def _cpu_s(client: "Client") -> float:
    """Sum the CPU seconds of this process and of the workers, which other work on the machine moves less."""
    workers: dict[str, float] = client.run(time.process_time)
    return time.process_time() + sum(workers.values())


def without_last_day(logs: Path, days: int) -> Iterator[Path]:
    """Yield the files of the logs, but those of the last day."""
    last = f"day={days - 1 + _HISTORY_DAYS:03d}.parquet"
    yield from (file for file in sorted(logs.glob("*/*")) if file.name != last)


if __name__ == "__main__":
    run_app(app)
