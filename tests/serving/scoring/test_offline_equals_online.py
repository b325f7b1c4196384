"""The matrix: a bundle's scores are the trainer's own logits, for every kind of model, inputs and missing images."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, get_args

import numpy as np
import pytest

from featurestore.lookup.partition import MissingPolicy
from serving.scoring.request import Request
from serving.scoring.scorer import Scorer
from tests.serving.scoring.variants import VARIANTS, Exported
from trainer.config.options import BaseNet, ModelConfig, Pooling
from trainer.evaluation.predict import predict_run

pytestmark = pytest.mark.long

TOLERANCE = 1e-5
Variants = Callable[[str], Exported]


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, variants: Variants) -> Exported:
    return variants(request.param)


@pytest.fixture
def scorer(variant: Exported) -> Iterator[Scorer]:
    with contextlib.closing(Scorer.open(variant.url)) as opened:
        yield opened


def requests_of(table: Any, scorer: Scorer) -> list[Request]:
    """A table's rows as requests."""
    sides = {name: rule.side for name, rule in scorer.columns.items()}
    return [
        Request(
            user={name: row[name] for name, side in sides.items() if side == "user"},
            candidates={name: row[name] for name, side in sides.items() if side == "ad"},
        )
        for row in table.to_pylist()
    ]


def logits_of(scored: list[Any]) -> Any:
    return np.concatenate([each.logits_C for each in scored])


def test_scores_are_the_trainers_logits(variant: Exported, scorer: Scorer) -> None:
    store = str(variant.places.folder / "features") if variant.run.name == "exact" else None  # one with gaps
    expected_N = predict_run(variant.run, store=store).logit_N
    assert np.ptp(expected_N) > 0.01
    table = variant.table.select([name for name in variant.table.column_names if name in scorer.columns])
    of_table = logits_of(scorer.score_table(table))
    np.testing.assert_allclose(of_table, expected_N, rtol=0, atol=TOLERANCE)
    requests = requests_of(table, scorer)
    np.testing.assert_array_equal(logits_of(scorer.score(requests)), of_table)
    few = requests[::5]  # with and without behaviours, of one candidate and of several
    one_by_one = logits_of([each for request in few for each in scorer.score([request])])
    np.testing.assert_allclose(one_by_one, logits_of(scorer.score(few)), rtol=0, atol=TOLERANCE)


def test_matrix_has_every_kind() -> None:
    """A net, aggregator or policy that is added to the trainer is added to the matrix."""

    def given(setting: str, default: str) -> set[str]:
        return {settings.get(setting, default) for settings in VARIANTS.values()}

    assert given("model__base", ModelConfig().base) == set(get_args(BaseNet))
    assert given("model__pooling", ModelConfig().pooling) == set(get_args(Pooling))
    assert given("data__missing", "zeros") == set(get_args(MissingPolicy))
