"""P ranks equal one process: the test that the exchange, the sharding and every reduction of a gradient rest on.

The reference (equivalence/reference.py) is plain torch, one occurrence at a time. All variants of
tests/variants.py run in one job for each P, because ranks take long to start; one rank is this process, and two
are those that stay for many tests. `make test` makes all runs alone and on two ranks of Horovod, and those of `FEW` on
four ranks and on two of torch; `make test-slow` makes the others there, on four ranks also the other ways, and all of
them on eight ranks and on four of torch.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from tests.ranks import Forks, StandingRanks, TorchRanks
from tests.trainer.checkpoints import assert_same_tensors
from tests.trainer.equivalence.packing import packed, unpacked
from tests.trainer.standing_ranks import run as run_here
from tests.variants import FEW, TOLERANCE, VARIANTS, has_other_ways
from trainer.config import BaseNet, IdOptimizer, Pooling
from trainer.ids.optimizers import state_of

pytestmark = pytest.mark.timeout(900)  # the first test of each number of ranks runs all of its variants

HERE = Path(__file__).parent
OF_ATTENTION = ".channels."
LEAST_OF_ATTENTION = 1e-4  # before a softmax, gradients cancel: a query's bias moves by what rounding leaves of them
ALL_RUNS = [f"{name}/{dtype}" for name, variant in VARIANTS.items() for dtype in variant.dtypes]
RUNS = [run for run in ALL_RUNS if VARIANTS[run.partition("/")[0]].most_ranks >= 8]
OF_FILTERS = ("/counts", "/faded", "/last_use", "/used_at", "/clock")
"""Of exact tables, beside rows and ids; see tests/trainer/ids."""
TORCH_2, TORCH_4 = TorchRanks(2), TorchRanks(4)
IN_TWO_PARTS = (str(4), str(TORCH_2), str(TORCH_4))  # as texts: as numbers, ranks of torchrun equal those of horovodrun
RANKS = [1, 2, 4, TORCH_2, *(pytest.param(each, marks=pytest.mark.slow) for each in (8, TORCH_4))]
OTHER_WAYS_RANKS = [1, 2, TORCH_2, *(pytest.param(each, marks=pytest.mark.slow) for each in (4, 8, TORCH_4))]


def _is_slow(num_ranks: int, run: str) -> bool:
    return str(num_ranks) in (str(8), str(TORCH_4)) or (str(num_ranks) in IN_TWO_PARTS and run not in FEW)


RUNS_ON_RANKS = [
    pytest.param(num_ranks, run, marks=[pytest.mark.slow] if _is_slow(num_ranks, run) else [])
    for num_ranks in (1, 2, 4, 8, TORCH_2, TORCH_4)
    for run in (RUNS if num_ranks > 2 else ALL_RUNS)
]

Results = Mapping[str, dict]
ResultsOf = Callable[[int], Results]
TIMEOUT_S = 600


class Job(dict[str, dict]):
    """Results of the variants on P ranks; the few and the rest, where told apart, are two jobs, run when asked for."""

    def __init__(self, folder: Path, num_ranks: int, fixture: Callable[[str], Any]) -> None:
        super().__init__()
        self._folder, self._num_ranks, self._fixture = folder, num_ranks, fixture
        if str(num_ranks) not in IN_TWO_PARTS:
            self._run("all")

    def __missing__(self, run: str) -> dict:
        is_few = run in FEW if "/" in run else run == "endings" or has_other_ways(self._num_ranks, "few")
        self._run("few" if is_few else "rest")
        return {**self}[run]

    def _run(self, part: str) -> None:
        out = self._folder / f"ranks-{self._num_ranks}-{part}.pickle"
        words = list(map(str, (HERE / "worker.py", self._folder / "store", out, part)))
        if self._num_ranks == 1:
            code, said = run_here(words)
            assert code == 0, said
        elif self._num_ranks == 2:
            ranks: StandingRanks = self._fixture("two_ranks" if str(self._num_ranks) == str(2) else "two_torch_ranks")
            ranks.run(*words, timeout_s=TIMEOUT_S)
        else:
            forks: Forks = self._fixture("forks")
            forks.run(self._num_ranks, out.with_suffix(".txt"), *words, timeout_s=TIMEOUT_S)
        self.update(unpacked(out.read_bytes()))


@pytest.fixture(scope="module")
def results_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ResultsOf:
    """Results of P ranks; each job runs once."""
    folder = tmp_path_factory.mktemp("equivalence")
    done = {str(1): Job(folder, 1, request.getfixturevalue)}  # which makes the stores

    def results(num_ranks: int) -> Results:
        if str(num_ranks) not in done:
            done[str(num_ranks)] = Job(folder, num_ranks, request.getfixturevalue)
        return done[str(num_ranks)]

    return results


@pytest.fixture(scope="module")
def reference(results_of: ResultsOf, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of the reference, from the initial values of a run of one rank."""
    folder = tmp_path_factory.mktemp("reference")
    kept = ("initial", "mean_and_std", "decoded")
    start = {run: {k: result[k] for k in kept} for run, result in results_of(1).items() if result.get("initial")}
    initial, out = folder / "initial.pickle", folder / "out.pickle"
    initial.write_bytes(packed(start))
    forks.run(1, folder / "said.txt", HERE / "reference.py", initial, out, timeout_s=TIMEOUT_S)
    return unpacked(out.read_bytes())


def test_every_choice_has_a_scenario_and_each_is_checked(reference: Results) -> None:
    assert sorted(reference) == sorted(ALL_RUNS)
    full = [reference[f"exact_evicting{each}/float64"]["evicted"] for each in ("", "_rank_without_data")]
    assert min(full[0]["user"], full[0]["item"], full[0]["image"], full[1]["user"], full[1]["image"]) >= 15, full
    models = [variant.config("float64") for variant in VARIANTS.values()]
    assert {model.pooling for model in models} == {*get_args(Pooling)}
    assert {model.base for model in models} == {*get_args(BaseNet)}
    assert {variant.optim.ids for variant in VARIANTS.values()} == {*get_args(IdOptimizer)}


@pytest.mark.parametrize(("num_ranks", "run"), RUNS_ON_RANKS)
def test_ranks_equal_one_process(num_ranks: int, run: str, results_of: ResultsOf, reference: Results) -> None:
    """Losses, first gradients, parameters and optimisers after the last step, rows that make room and expire, and the
    collectives."""
    variant, found, expected = VARIANTS[run.partition("/")[0]], results_of(num_ranks)[run], reference[run]
    losses_P = torch.tensor(found["losses_P"], dtype=torch.float64)
    assert losses_P.shape == (num_ranks, variant.steps) and (losses_P == losses_P[0]).all()
    losses = torch.tensor(expected["losses"], dtype=torch.float64)
    torch.testing.assert_close(losses_P[0], losses, rtol=_tolerance(run), atol=0)
    gradients = expected["gradients"]
    if "momentum" not in {part.name for part in state_of(variant.optim)}:
        # The first gradients of ID rows are not to be seen.
        gradients = {name: value for name, value in gradients.items() if name in found["gradients"]}
    _assert_same(found["gradients"], gradients, _tolerance(run))
    known = ("_D", "num_steps", "learning_rates", *OF_FILTERS)
    trained = {name: value for name, value in found["trained"].items() if not name.endswith(known)}
    _assert_same(trained, expected["trained"], _tolerance(run), of_attention=LEAST_OF_ATTENTION)
    alone = results_of(1)[run]["trained"]  # counts of ids without a row
    counts = [name for name in alone if name.endswith(OF_FILTERS)]
    assert all(torch.equal(found["trained"][name], alone[name]) for name in counts)
    assert bool(counts) == run.startswith("exact")
    assert (found["expired"], found["evicted"]) == (expected["expired"], expected["evicted"])
    assert (min(found["expired"].values(), default=0) >= 2) == (run == "exact/float64"), found["expired"]
    assert found["calls"] == {f"step.{each}": variant.steps for each in _collectives(run.partition("/")[0], num_ranks)}


def _collectives(name: str, num_ranks: int) -> list[str]:
    """List those of a step: two forward and one backward, which a rank alone does without, and those of gradients."""
    widths = {"two_widths": [3, 5], "lr_ids_only": [1], "lr": [1, 5]}.get(name, [5])
    widths = [3, 5] if VARIANTS[name].texts else widths
    dense = ("model",) if VARIANTS[name].model.get("images") == "none" else ("model", "stores")
    names = ["keys", *(f"{kind}.{width}" for kind in ("vectors", "gradients") for width in widths)]
    return [*(names if num_ranks > 1 else []), *(f"dense.{part}" for part in dense)]


@pytest.mark.parametrize(
    ("num_ranks", "run"),
    [
        *((2, run) for run in (*FEW, "plain delayed")),
        *(pytest.param(4, run, marks=pytest.mark.slow) for run in RUNS if run in FEW),
        *(pytest.param(2, run, marks=pytest.mark.slow) for run in ALL_RUNS if run not in FEW),
    ],
)
def test_both_communicators_give_the_same_bits(num_ranks: int, run: str, results_of: ResultsOf) -> None:
    """Two numbers have one sum in either order; for more, the sums of both are Gloo's ring."""
    by_torchrun, by_horovodrun = results_of(TorchRanks(num_ranks))[run], results_of(num_ranks)[run]
    assert by_torchrun["losses_P"] == by_horovodrun["losses_P"]
    assert_same_tensors(by_torchrun["trained"], by_horovodrun["trained"])


@pytest.mark.parametrize("num_ranks", OTHER_WAYS_RANKS)
@pytest.mark.parametrize("way", ["plain delayed", "plain held", "sum_rank_without_data held"])
def test_no_other_way_changes_a_bit(num_ranks: int, way: str, results_of: ResultsOf) -> None:
    """With slow and fast ranks, and with features held on the device."""
    found, usual = results_of(num_ranks)[way], results_of(num_ranks)[f"{way.partition(' ')[0]}/float64"]
    assert found["losses_P"] == usual["losses_P"]
    assert_same_tensors(found["trained"], usual["trained"])


@pytest.mark.parametrize("num_ranks", RANKS)
def test_an_error_of_one_rank_stops_every_rank_and_in_e_before_anything_moves(
    num_ranks: int, results_of: ResultsOf
) -> None:
    """A missing key, a reader's, and one in E."""
    endings, last_rank = results_of(num_ranks)["endings"], f"RemoteRankError: rank {num_ranks - 1} failed: "
    own = [e for e in endings["missing_key"] if e.startswith("MissingKeysError: ")]
    remote = [each for each in endings["missing_key"] if "failed: MissingKeysError" in each]
    assert all(each.startswith("RemoteRankError: rank ") for each in remote)
    assert own and len(own) + len(remote) == num_ranks
    *others, last = endings["reader"]
    assert last == "DataError: day=1.parquet: label=7 is not 0 or 1"
    assert set(others) <= {last_rank + last}
    *others, last = endings["embed"]
    assert last.startswith("MemoryError: no room for what ")
    assert others == [last_rank + last] * (num_ranks - 1)
    assert endings["moved"] == [[]] * num_ranks
    assert len(set(endings["losses"])) == 1


def _tolerance(run: str) -> float:
    return TOLERANCE[run.rpartition("/")[2]]


def _assert_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, of_attention: float = 1e-6
) -> None:
    """Same names; each tensor within `tolerance` of its largest value, taken as at least 1e-6 (squares: 1e-12, parts of
    attention: `of_attention`)."""
    assert sorted(actual) == sorted(expected)
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        if value.numel():
            is_square = name.endswith(("exp_avg_sq", "variance", "sum"))
            least = 1e-12 if is_square else of_attention if OF_ATTENTION in name else 1e-6
            scale = max(float(value.double().abs().max()), least)
            difference = float((actual[name].double() - value.double()).abs().max())
            assert difference <= tolerance * scale, f"{name}: {difference:.3g} of {scale:.3g}"
