"""Hot switch, warm-up and refusal of broken versions, in one process with a fake model."""

import contextlib
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from serving.bundle.log import BundleIdentity
from serving.errors import BrokenBundleError, NotFiniteError
from serving.http.limits import RefusedError
from serving.http.live import LiveModel, warm_up
from serving.http.metrics import ServingMetrics
from serving.scoring.request import Scored
from tests.serving.http.fakes import FakeModel, FakeSource, figures_of, write_state

pytestmark = pytest.mark.anyio


def figures(live: LiveModel) -> dict[str, float]:
    return figures_of(live.metrics.text().decode())


def live_of(folder: Path, **state: object) -> LiveModel:
    return LiveModel(FakeSource(write_state(folder, **state)), ServingMetrics(), poll_s=0.01)


async def test_a_newer_version_and_newer_vectors_are_switched_to_and_the_old_one_is_closed(tmp_path: Path) -> None:
    live = live_of(tmp_path, version=1, vectors={"images": 5})
    with pytest.raises(RefusedError):
        _ = live.model
    await live.start()
    first = live.model
    await live.poll_once()
    assert live.model is first
    write_state(tmp_path, version=1, vectors={"images": 6})
    await live.poll_once()
    second = live.model
    assert second.identity == BundleIdentity(1, {"images": 6})
    assert (first.closed, second.closed) == (True, False)
    write_state(tmp_path, version=2, vectors={"images": 1})
    await live.poll_once()
    assert live.model.identity.version == 2
    write_state(tmp_path, version=1, vectors={"images": 6})  # a rollback is a switch like any other
    await live.poll_once()
    assert live.model.identity.version == 1
    found = figures(live)
    assert (found['serving_switches_total{result="switched"}'], found["serving_model_version"]) == (3, 1)
    live.close()
    assert not live.is_ready


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time that a switch sees, in `now_s`."""
    clock = SimpleNamespace(now_s=0.0, perf_counter=time.perf_counter)
    clock.monotonic = lambda: clock.now_s
    monkeypatch.setattr("serving.http.live.time", clock)
    return clock


async def test_a_broken_version_is_refused_ever_more_seldom_and_the_old_one_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, clock: SimpleNamespace
) -> None:
    refused = 'serving_switches_total{result="refused"}'
    live = live_of(tmp_path, version=1)
    await live.start()
    write_state(tmp_path, version=2, broken=True)
    for _ in range(5):
        await live.poll_once()  # tried again after a pause only
    assert figures(live)[refused] == 1
    for _ in range(1000):
        clock.now_s += live.poll_s
        await live.poll_once()
    assert 8 <= figures(live)[refused] <= 12
    assert live.model.identity.version == 1
    write_state(tmp_path, version=2)
    clock.now_s += 1000
    await live.poll_once()
    assert live.model.identity.version == 2
    assert "refused version 2, still serving version 1" in caplog.text
    assert "network.pt2" in caplog.text


async def test_an_unreadable_place_is_told_once_and_retried(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    live = live_of(tmp_path, version=1)
    await live.start()
    (tmp_path / "fake.json").unlink()
    for _ in range(3):
        await live.poll_once()
    assert live.model.identity.version == 1
    write_state(tmp_path, version=2)
    await live.poll_once()
    assert live.model.identity.version == 2
    assert caplog.text.count("cannot look for a newer model") == 1


class Counting(FakeModel):
    """Counts what it scores; the logits of item 8 are not finite numbers."""

    calls: int = 0
    judge: pa.Table | None = None

    def sample(self) -> pa.Table | None:
        return self.judge

    def score(self, table: pa.Table) -> list[Scored]:
        scored = super().score(table)
        self.calls += len(scored)
        if table["ad_item"].to_pylist() == [[8]]:
            raise NotFiniteError("the logit of candidate 0 is not a finite number")
        return scored


def test_a_model_is_warmed_up_by_its_sample() -> None:
    model = Counting(BundleIdentity(1, {}))
    assert warm_up(model) == model.calls == 0
    for rows in (0, 3):
        model.calls, model.judge = 0, pa.table({"ad_item": pa.array([[5, 6]] * rows, pa.list_(pa.int64()))})
        assert warm_up(model) == model.calls == rows


def test_a_model_whose_sample_has_no_finite_scores_is_refused() -> None:
    model = Counting(BundleIdentity(1, {}))
    for items, is_sound in (([[5], [7]], True), ([[5], [8]], False)):
        model.judge = pa.table({"ad_item": items})
        with contextlib.nullcontext() if is_sound else pytest.raises(BrokenBundleError, match="not finite numbers"):
            warm_up(model)


async def test_a_model_that_fails_its_warm_up_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FakeSource(write_state(tmp_path, version=1))
    live = LiveModel(source, ServingMetrics(), poll_s=0.01)

    def fails(model: object) -> int:
        raise MemoryError

    await live.start()
    monkeypatch.setattr("serving.http.live.warm_up", fails)
    write_state(tmp_path, version=2)
    await live.poll_once()
    assert [model.closed for model in source.opened] == [False, True]
