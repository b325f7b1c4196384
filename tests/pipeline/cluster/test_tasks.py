"""Tasks on a cluster: results in the order of the calls, and a mistake that is raised once, not tried again."""

import time

import pytest
from distributed import Client

from featurestore.errors import KeyCollisionError
from pipeline.cluster.tasks import run_all, run_tasks
from pipeline.errors import SampleError


def fail(kind, path):
    """Note the attempt in a file, and raise."""
    with path.open("a") as file:
        file.write("tried\n")
    raise kind("no good")


def fail_beside(path, number):
    """Task 0 raises while task 1 runs, which ends a while later; each leaves a file."""
    (path / f"{number} started").touch()
    if number == 0:
        while not (path / "1 started").exists():
            time.sleep(0.01)
        raise SampleError("no good")
    time.sleep(0.5)
    (path / f"{number} ended").touch()


def test_results_come_in_the_order_of_the_calls(client):
    assert run_all(client, "powers", pow, [(2, number) for number in range(40)], "no advice") == [
        2**number for number in range(40)
    ]
    assert dict(run_tasks(client, pow, [(3, 1), (3, 2)], in_flight=1)) == {0: 3, 1: 9}
    assert dict(run_tasks(client, pow, [(2, number) for number in range(40)], in_flight=36)) == {
        number: 2**number for number in range(40)
    }


@pytest.mark.parametrize(("kind", "attempts"), [(SampleError, 1), (KeyCollisionError, 1), (OSError, 2)])
def test_a_mistake_is_raised_at_once_and_another_error_is_tried_again(client, tmp_path, kind, attempts):
    with pytest.raises(kind, match="no good"):
        run_all(client, "failing", fail, [(kind, tmp_path / "tried")], "no advice")
    assert (tmp_path / "tried").read_text().splitlines() == ["tried"] * attempts


def test_what_runs_beside_a_mistake_ends_before_it_is_raised_and_nothing_starts_then(cluster, tmp_path):
    with Client(cluster) as client, pytest.raises(SampleError, match="no good"):
        run_all(client, "failing", fail_beside, [(tmp_path, number) for number in range(12)], "no advice")
    left = {path.name for path in tmp_path.iterdir()}
    assert {"1 started", "1 ended"} <= left
    assert {name.removesuffix(" started") for name in left if name.endswith("started")} == {
        "0",
        *(name.removesuffix(" ended") for name in left if name.endswith("ended")),
    }
    time.sleep(1)
    assert {path.name for path in tmp_path.iterdir()} == left
