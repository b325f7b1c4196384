"""P ranks equal one process: the test that the exchange, the sharding and every reduction of a gradient rest on.

The reference (equivalence/reference.py) is plain torch, one occurrence at a time. All scenarios of
equivalence/scenarios.py run in one job for each P, because ranks take seconds to start.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent / "equivalence"
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
RUNS = [
    "both_attentive/float64",
    "both_attentive/float32",
    "two_widths_two_models/float64",
    "sum_rank_without_data/float64",
    "sum_rank_without_data/float32",
    "one_owner/float64",
    "behavior_sum/float64",
    "ad_colliding_ids/float64",
    "ids_only/float64",
    "missing_zeros/float64",
    "int8_codes/float64",
    "missing_learned/float64",
    "two_towers/float64",
    "two_towers/float32",
    "two_towers_ids_only/float64",
]
RANKS = [1, 2, 4, pytest.param(8, marks=pytest.mark.slow)]

Results = dict[str, dict]


@pytest.fixture(scope="module")
def results_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Results]:
    """Results of a job of P ranks, run once."""
    folder = tmp_path_factory.mktemp("equivalence")
    script = "import scenarios, pathlib, sys; scenarios.make_store(pathlib.Path(sys.argv[1]))"
    _run([sys.executable, "-c", script, str(folder / "store")])
    done: dict[int, Results] = {}

    def results(num_ranks: int) -> Results:
        if num_ranks not in done:
            launcher = Path(sys.executable).with_name("horovodrun")
            start = [str(launcher), "-np", str(num_ranks)] if num_ranks > 1 else []
            out = folder / f"ranks-{num_ranks}.pt"
            _run([*start, sys.executable, str(HERE / "worker.py"), str(folder / "store"), str(out)])
            done[num_ranks] = torch.load(out)
        return done[num_ranks]

    return results


@pytest.fixture(scope="module")
def reference(results_of: Callable[[int], Results], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of the reference, from the initial values of a run of one rank."""
    folder = tmp_path_factory.mktemp("reference")
    kept = ("initial", "mean_and_std", "decoded")
    start = {run: {k: result[k] for k in kept} for run, result in results_of(1).items() if "initial" in result}
    torch.save(start, folder / "initial.pt")
    _run([sys.executable, str(HERE / "reference.py"), str(folder / "initial.pt"), str(folder / "out.pt")])
    results: Results = torch.load(folder / "out.pt")
    return results


def test_every_scenario_is_checked(reference: Results) -> None:
    assert sorted(reference) == sorted(RUNS)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("num_ranks", RANKS)
class TestEquivalence:
    def test_losses(self, run: str, num_ranks: int, results_of: Callable[[int], Results], reference: Results) -> None:
        losses_P = torch.tensor(results_of(num_ranks)[run]["losses_P"], dtype=torch.float64)
        assert losses_P.shape == (num_ranks, 20)
        assert (losses_P == losses_P[0]).all()
        expected = torch.tensor(reference[run]["losses"], dtype=torch.float64)
        torch.testing.assert_close(losses_P[0], expected, rtol=_tolerance(run), atol=0)

    def test_first_gradients(
        self, run: str, num_ranks: int, results_of: Callable[[int], Results], reference: Results
    ) -> None:
        _assert_same(results_of(num_ranks)[run]["gradients"], reference[run]["gradients"], _tolerance(run))

    def test_parameters_and_optimisers_after_the_last_step(
        self, run: str, num_ranks: int, results_of: Callable[[int], Results], reference: Results
    ) -> None:
        trained = {
            n: v for n, v in results_of(num_ranks)[run]["trained"].items() if not n.endswith(("_D", "num_steps"))
        }
        _assert_same(trained, reference[run]["trained"], _tolerance(run))

    def test_two_collectives_forward_and_one_backward(
        self, run: str, num_ranks: int, results_of: Callable[[int], Results]
    ) -> None:
        expected = ["keys", "vectors.5", "gradients.5", "dense"]
        if run.startswith("two_widths"):
            expected = ["keys", "vectors.3", "vectors.5", "gradients.3", "gradients.5", "dense"]
        assert all(calls == expected for calls in results_of(num_ranks)[run]["calls"])


@pytest.mark.parametrize("num_ranks", RANKS)
class TestEndings:
    def test_a_missing_key_stops_every_rank(self, num_ranks: int, results_of: Callable[[int], Results]) -> None:
        endings = results_of(num_ranks)["endings"]["missing_key"]
        own = [e for e in endings if e.startswith("MissingKeysError: ")]
        remote = [e for e in endings if e.startswith("RemoteRankError: rank ") and "failed: MissingKeysError" in e]
        assert own
        assert len(own) + len(remote) == num_ranks

    def test_a_reader_error_stops_every_rank(self, num_ranks: int, results_of: Callable[[int], Results]) -> None:
        *others, last = results_of(num_ranks)["endings"]["reader"]
        assert last == "DataError: day=1.parquet: label=7 is not 0 or 1"
        assert set(others) <= {f"RemoteRankError: rank {num_ranks - 1} failed: {last}"}


def _run(command: list[str]) -> None:
    search = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, f"{shutil.which(command[0])}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def _tolerance(run: str) -> float:
    return TOLERANCE[run.rpartition("/")[2]]


def _assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Same names; each tensor within `tolerance` of its largest value, taken as at least 1e-6 (squares: 1e-12)."""
    assert sorted(actual) == sorted(expected)
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        if value.numel():
            least = 1e-12 if name.endswith(("exp_avg_sq", "variance")) else 1e-6
            scale = max(float(value.double().abs().max()), least)
            difference = float((actual[name].double() - value.double()).abs().max())
            assert difference <= tolerance * scale, f"{name}: {difference:.3g} of {scale:.3g}"
