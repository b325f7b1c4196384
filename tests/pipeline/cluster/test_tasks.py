"""Tasks on a cluster: results in the order of the calls, and a mistake that is raised once, not tried again."""

import pytest

from featurestore.errors import KeyCollisionError
from pipeline.cluster.tasks import run_all, run_tasks
from pipeline.errors import SampleError


def fail(kind, path):
    """Note the attempt in a file, and raise."""
    with path.open("a") as file:
        file.write("tried\n")
    raise kind("no good")


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
