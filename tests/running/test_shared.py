"""What processes of a test run share is made once, though several want it at the same time."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from tests.running.shared import made_once, shared_folder


def test_one_makes_it_and_all_others_wait(tmp_path: Path) -> None:
    made: list[int] = []
    together = Barrier(4)

    def want(number: int) -> list[int]:
        together.wait()
        made_once(tmp_path / "shared", "it", lambda: made.append(number))
        return list(made)

    with ThreadPoolExecutor(4) as threads:
        seen = list(threads.map(want, range(4)))
    assert len(made) == 1
    assert seen == [made] * 4


def test_what_fails_is_tried_again(tmp_path: Path) -> None:
    made: list[str] = []
    with pytest.raises(ZeroDivisionError):
        made_once(tmp_path / "shared", "it", lambda: 1 / 0)
    made_once(tmp_path / "shared", "it", lambda: made.append("it"))
    made_once(tmp_path / "shared", "other", lambda: made.append("other"))
    made_once(tmp_path / "shared", "it", lambda: made.append("again"))
    assert made == ["it", "other"]


@pytest.mark.parametrize("worker", [None, "gw1"])
def test_workers_have_one_folder_beside_their_own(
    worker: str | None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    own = tmp_path / "popen-gw1"
    own.mkdir()
    monkeypatch.setattr(tmp_path_factory, "getbasetemp", lambda: own)
    if worker:
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
    assert shared_folder(tmp_path_factory, "it").parent == (tmp_path if worker else own)
