"""A net of the user's own, `model.base=mypackage.MyNet`: the example of docs/CODE.md, from training to serving."""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from explorer.export import export as export_pages
from explorer.html.site import Site
from explorer.places import Places
from explorer.problems import Problem as Unshown
from explorer.server import application
from serving.scoring.scorer import Scorer
from tests.raised import raises, told
from tests.ranks import StandingRanks
from tests.serving.scoring.variants import export
from tests.trainer.checkpoints import differs, tensors_of
from tests.trainer.conftest import Places as SamplePlaces
from tests.trainer.whole_runs import assert_same, run_alone
from trainer.config import ModelConfig, load_config
from trainer.errors import CheckpointError, ConfigError, TrainerError
from trainer.evaluation.predict import predict_run
from trainer.models.nets import build_model
from trainer.problems import Problem
from trainer.schema.fields import load_schema

ROOT = Path(__file__).parents[3]
BASE = "mypackage.MyNet"
SHARED = {"model__base": BASE, "model__compute_dtype": "float64", "train__max_steps": 12, "run__name": "own"}
EXAMPLE = re.search(r"```python\n(from torch import nn.*?)```", (ROOT / "docs" / "CODE.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `mypackage`, which can be imported in the module's tests."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "mypackage").mkdir()
    broken = "import torch\nimport no_such_thing\n"
    for name, text in {"__init__": EXAMPLE[1], "wrong": WRONG, "broken": broken}.items():
        (folder / "mypackage" / f"{name}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
        sys.modules.pop("mypackage", None)


@pytest.fixture(scope="module")
def own(places: SamplePlaces, package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps of one rank."""
    run = run_alone(places, run__dir=tmp_path_factory.mktemp("own"), train__checkpoint_every=5, **SHARED)
    assert load_config(run / "config.yaml").model.base == BASE and any("model.wide" in name for name in tensors_of(run))
    return run


@pytest.mark.long
def test_resumed_is_undisturbed_and_another_net_is_refused(own: Path, places: SamplePlaces, tmp_path: Path) -> None:
    """A warm start takes every setting for one that the net reads."""
    begun = {**SHARED, "run__dir": tmp_path, "run__resume": own / "checkpoints" / "step-00000005"}
    assert_same(run_alone(places, **begun), own)
    warm = {**SHARED, "run__dir": tmp_path, "run__warm_start": own, "run__warm_parts": "all"}
    base, width = differs("model.base", "mlp", other=BASE), differs("model.tower_width", 16, other=32)
    for settings, problem in ((begun, Problem.CHECKPOINT_OF_OTHER_RUN), (warm, Problem.WARM_START_OF_OTHER_RUN)):
        with raises(CheckpointError, problem, differing=base):
            run_alone(places, **{**settings, "run__name": "other", "model__base": "mlp"})
    with raises(CheckpointError, Problem.WARM_START_OF_OTHER_RUN, differing=width):
        run_alone(places, **{**warm, "run__name": "warm", "model__tower_width": 16})


@pytest.mark.long
def test_exported_and_scored_without_the_package_as_evaluated(
    own: Path, places: SamplePlaces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, expected = str(tmp_path / "model"), predict_run(own).logit_N
    export(own, url)
    assert np.ptp(expected) > 0.01
    monkeypatch.setitem(sys.modules, "mypackage", None)  # importing it fails, as where it is not installed
    samples = pq.read_table(places.folder / "samples" / "test" / "day=2026-01-01.parquet", partitioning=None)
    with contextlib.closing(Scorer.open(url, cache_dir=tmp_path / "cache")) as scorer:
        found = np.concatenate([each.logits_C for each in scorer.score(samples.select(list(scorer.inputs.sources)))])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


WRONG = """
import torch
from torch import nn
from trainer.models.ctr import CtrModel, Dicm
class Plain(nn.Module): ...
class Fixed(CtrModel):
    def __init__(self, schema, config):
        super().__init__(schema, config)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)
class Shape(Dicm):
    def forward(self, *given):
        return super().forward(*given)[:, None]
class Nan(Dicm):
    def forward(self, *given):
        return super().forward(*given) * float("nan")
"""
NO_MODULE = re.compile("^ModuleNotFoundError: No module named 'no_such")


@pytest.mark.parametrize(
    ("path", "problem", "values"),
    [
        ("nopackage.MyNet", Problem.NET_NOT_IMPORTED, {"module": "nopackage"}),
        ("mypackage.broken.MyNet", Problem.NET_NOT_IMPORTED, {"module": "mypackage.broken", "reason": NO_MODULE}),
        ("mypackage.wrong.NoNet", Problem.NO_SUCH_NET, {"module": "mypackage.wrong", "name": "NoNet"}),
        ("mypackage.wrong.torch", Problem.NO_SUCH_NET, {"module": "mypackage.wrong", "name": "torch"}),
        ("mypackage.wrong.Plain", Problem.NO_SUCH_NET, {"module": "mypackage.wrong", "name": "Plain"}),
        ("mypackage.wrong.Fixed", Problem.FIXED_PARAMETER, {"parameter": "scale"}),
    ],
)
def test_an_unfit_class_is_one_line(path: str, problem: Problem, values: dict[str, Any], package: Path) -> None:
    with raises(ConfigError, problem, value=path, **values) as raised:
        build_model(load_schema(), ModelConfig(base=path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("Shape", ValueError, "must be the same as input size"),
        ("Nan", TrainerError, told(Problem.LOSS_NOT_FINITE, where=1, value="nan")),
    ],
)
def test_an_answer_that_does_not_fit_trains_nothing(
    name: str, error: type[Exception], says: str, package: Path, places: SamplePlaces, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        run_alone(places, run__dir=tmp_path, model__base=f"mypackage.wrong.{name}", model__compute_dtype="float32")


def test_rank_0_tells_that_rank_1_lacks_a_net(two_ranks: StandingRanks, places: SamplePlaces, tmp_path: Path) -> None:
    base = "tests.trainer.models.rank_1_lacks.MyNet"
    settings = places.settings(run__dir=tmp_path, model__base=base)
    (code, out), (other, _) = two_ranks.call("-m", "trainer.main", "--set", *settings)
    assert (code, other) == (1, 2) and out.count("error: ") == 1
    missing = told(Problem.NET_NOT_IMPORTED, value=base, reason=re.compile(".*no_such_package.*"))
    assert re.search(missing, out) and "rank 1" in out


@pytest.mark.long
def test_pages_import_only_the_package_that_is_named(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "mypackage", raising=False)
    with TestClient(application(Site(Places(runs=str(own.parent))))) as client:
        assert [client.get(path).status_code for path in ("/", "/runs", "/runs/own", "/impressions")] == [200] * 4
        refused = client.get("/impressions?run=own&wait=list")
        assert refused.status_code == 200 and re.search(told(Unshown.OWN_NET, package="mypackage"), refused.text)
        assert '<select name="run"' in refused.text  # to choose another run
    exported = export_pages(Places(runs=str(own.parent)), tmp_path / "pages", 100, lambda done, known: None)
    assert exported.errors == []
    assert "mypackage" not in sys.modules
    with TestClient(application(Site(Places(runs=str(own.parent), nets="mypackage")))) as client:
        assert "Why " in client.get("/impressions?run=own&wait=list").text
