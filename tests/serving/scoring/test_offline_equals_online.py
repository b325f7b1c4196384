"""The matrix: a bundle's scores are the trainer's own logits, for every kind of model, inputs and missing images.

And what a scorer says beside scores, and requests with nothing known or nothing in them: in one file, as another one
would open the same scorers again. What the matrix notices: tests/breaks.toml.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any, get_args

import numpy as np
import pytest

from featurestore.spec import MissingPolicy
from serving.errors import NotFiniteError
from serving.network import Steps
from serving.network.served import NetworkInputs, ServedNetwork
from serving.problems import Problem
from serving.scoring.request import Request, Scored
from serving.scoring.scorer import Scorer
from tests.raised import raises
from tests.serving.scoring.variants import GONE, SERVED, Variants
from trainer.config import BaseNet, ModelConfig, Pooling
from trainer.evaluation.predict import predict_run
from trainer.runs.checkpoint import read_rows
from trainer.runs.saved import read_run

pytestmark = pytest.mark.long

TOLERANCE = 1e-5
Opened = Callable[[str], tuple[Scorer, list[Request]]]
NEVER_SEEN = 10**12


@pytest.fixture(scope="module")
def opened(variants: Variants) -> Iterator[Opened]:
    """Gives the scorer of a variant, opened once, and the test samples as requests."""
    with contextlib.ExitStack() as stack:

        @cache
        def get(name: str) -> tuple[Scorer, list[Request]]:
            model = variants(name)
            scorer = stack.enter_context(contextlib.closing(Scorer.open(model.url)))
            return scorer, requests_of(model.table, scorer)

        yield get


def requests_of(table: Any, scorer: Scorer) -> list[Request]:
    sides = {name: rule.side for name, rule in scorer.inputs.sources.items()}
    return [
        Request(
            user={name: row[name] for name, side in sides.items() if side == "user"},
            candidates={name: row[name] for name, side in sides.items() if side == "ad"},
        )
        for row in table.to_pylist()
    ]


def logits_of(scored: list[Any]) -> Any:
    return np.concatenate([each.logits_C for each in scored])


@pytest.mark.parametrize("name", SERVED)
def test_scores_are_the_trainers_logits(variants: Variants, opened: Opened, name: str) -> None:
    variant = variants(name)
    scorer, requests = opened(name)
    store = str(variant.places.folder / "features") if variant.run.name == "exact" else None  # one with gaps
    expected_N = predict_run(variant.run, store=store).logit_N
    assert np.ptp(expected_N) > 0.01
    table = variant.table.select([name for name in variant.table.column_names if name in scorer.inputs.sources])
    of_table = logits_of(scorer.score(table))
    np.testing.assert_allclose(of_table, expected_N, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(logits_of(scorer.score(requests)), of_table)
    few = requests[::5]  # with and without behaviours, of one candidate and of several
    one_by_one = logits_of([each for request in few for each in scorer.score([request])])
    np.testing.assert_allclose(one_by_one, logits_of(scorer.score(few)), rtol=0, atol=TOLERANCE)


def test_matrix_has_every_kind() -> None:
    """A net, aggregator or policy that is added to the trainer is added to the matrix."""

    def given(setting: str, default: str) -> set[str]:
        return {settings.get(setting, default) for settings in SERVED.values()}

    assert given("model__base", ModelConfig().base) == set(get_args(BaseNet))
    assert given("model__pooling", ModelConfig().pooling) == set(get_args(Pooling))
    assert given("data__missing", "zeros") == set(get_args(MissingPolicy))


def changed(request: Request, **columns: Any) -> Request:
    """The request with other columns of the user or of candidates."""
    sides = {"user": request.user, "candidates": request.candidates}
    return replace(request, **{side: of | {c: columns[c] for c in of if c in columns} for side, of in sides.items()})


def places(found: Any) -> dict[str, list[int]]:
    return {name: each.tolist() for name, each in found.items()}


def test_missing_images_are_told(opened: Opened) -> None:
    scorer, requests = opened("contents")
    for request, scored in zip(requests, scorer.score(requests), strict=True):
        expected: dict[str, list[int]] = {}
        for side, of in (("behavior", request.user), ("ad", request.candidates)):
            for field, gone in ((f"{side}_image", GONE), (f"{side}_text", (1_049,))):
                lacking = [place for place, key in enumerate(of[f"{side}_image"]) if key in gone]
                if lacking:
                    expected[field] = lacking
        assert places(scored.missing) == expected
    assert any(scored.missing for scored in scorer.score(requests))


def test_unknown_ids_are_those_without_a_row(variants: Variants, opened: Opened) -> None:
    model = variants("exact")
    saved = read_run(model.run)
    names = [f"item/{shard:04d}/ids" for shard in range(saved.config.model.table_shards)]
    has_row = {each for ids in read_rows(saved.checkpoint, saved.state, names).values() for each in ids.tolist()}
    scorer, requests = opened("exact")
    found = 0
    for request, scored in zip(requests, scorer.score(requests), strict=True):
        for column, of in (("behavior_item", request.user), ("ad_item", request.candidates)):
            lacking = [place for place, item in enumerate(of[column]) if item not in has_row]
            assert places(scored.unknown).get(column, []) == lacking
            found += len(of[column]) - len(lacking)
    assert found > 0
    (stranger,) = scorer.score([changed(requests[0], user=NEVER_SEEN)])
    assert places(stranger.unknown)["user"] == [0]


def test_null_images_score_as_images_without_a_vector(opened: Opened) -> None:
    scorer, requests = opened("contents")
    request = requests[0]
    nobody = [None] * len(request.candidates["ad_image"])
    (null,) = scorer.score([changed(request, ad_image=nobody)])
    (gone,) = scorer.score([changed(request, ad_image=[NEVER_SEEN] * len(nobody))])
    every = list(range(len(nobody)))
    assert places(null.missing)["ad_image"] == places(gone.missing)["ad_text"] == every
    assert places(null.unknown)["ad_image_id"] == every
    with_images = scorer.score([request])[0].logits_C
    assert np.abs(null.logits_C - with_images).max() > 1e-4


@pytest.mark.parametrize("name", ["contents", "inputs", "exact", "id_proxy"])
def test_nothing_known_and_nothing_in_it(opened: Opened, name: str) -> None:
    scorer, requests = opened(name)
    rules, request = scorer.inputs.sources, requests[0]
    stranger = changed(
        request,
        **{c: [] for c, rule in rules.items() if rule.side == "user" and rule.depth},
        **{c: NEVER_SEEN for c, rule in rules.items() if rule.side == "user" and not rule.depth and not rule.is_real},
    )
    nobody = replace(request, candidates={column: [] for column in request.candidates})
    alone = [scorer.score([each])[0] for each in (stranger, nobody, request)]
    together = scorer.score([stranger, nobody, request])
    assert [len(each.logits_C) for each in together] == [len(each.logits_C) for each in alone]
    for one, other in zip(alone, together, strict=True):
        assert np.isfinite(one.logits_C).all() and one.logits_C.dtype == np.float32
        np.testing.assert_allclose(other.logits_C, one.logits_C, rtol=0, atol=1e-6)
        assert places(one.unknown) == places(other.unknown)
    assert len(alone[1].logits_C) == 0 and len(alone[1].probabilities()) == 0
    assert scorer.score([]) == []


def test_a_request_whose_logits_are_not_finite_is_refused_by_name(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a transform makes infinite: test_decode.py and test_check.py."""
    scorer, requests = opened("inputs")
    request = next(each for each in requests if len(each.candidates["ad_shape"]) > 1)
    right = ServedNetwork.steps

    def overflows(self: ServedNetwork, inputs: NetworkInputs) -> Steps[Any]:
        logits_B = yield from right(self, inputs)
        logits_B[-1] = np.inf
        return logits_B

    monkeypatch.setattr(ServedNetwork, "steps", overflows)
    last = len(request.candidates["ad_shape"]) - 1
    with raises(NotFiniteError, Problem.LOGIT_NOT_FINITE, where="requests[1]: ", candidate=last):
        scorer.score([requests[3], request])


def test_probabilities() -> None:
    scored = Scored(logits_C=np.array([0, 100, -100], np.float32), unknown={}, missing={})
    np.testing.assert_allclose(scored.probabilities(), [0.5, 1, 0], atol=1e-30)
