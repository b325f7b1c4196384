"""Layers of the networks: pooling and softmax against plain loops, norms against torch's, dropout, starts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainer.config.options import ModelConfig
from trainer.exchange.vectors import take_rows
from trainer.models.layers import (
    GlobalBatchNorm,
    HiddenLayers,
    Mlp,
    PlacedDropout,
    StepPlace,
    expand_rows,
    segment_max,
    segment_softmax,
    segment_sum,
)
from trainer.models.nets import build_model
from trainer.schema import Field, Schema, load_schema

LENGTHS = torch.tensor([2, 0, 3])


def values(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


class TestLayers:
    @pytest.mark.parametrize("num_rows", [41, 1 << 16, 200_000])
    def test_take_rows_sums_many_gradients_in_order(self, num_rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        high_N = torch.randint(0, 1 + (num_rows >> 16), (5000,), generator=generator) << 16
        index_N = (high_N + torch.randint(0, 40, (5000,), generator=generator)).clamp_max(num_rows - 1)
        weight_N = torch.randn(5000, generator=generator)
        vectors = torch.zeros(num_rows, requires_grad=True)
        (take_rows(vectors, index_N) * weight_N).sum().backward()
        order_N = torch.argsort(index_N, stable=True)
        counts_U = torch.bincount(index_N, minlength=num_rows)
        assert torch.equal(vectors.grad, torch.segment_reduce(weight_N[order_N], "sum", lengths=counts_U))

    def test_expand_rows_and_segment_sum(self) -> None:
        rows = values(3, 2)
        assert torch.equal(expand_rows(rows, LENGTHS, 5), rows[[0, 0, 2, 2, 2]])
        assert torch.autograd.gradcheck(expand_rows, (rows, LENGTHS, 5))
        summed = segment_sum(values(5, 2), LENGTHS)
        expected = torch.stack([values(5, 2)[:2].sum(0), torch.zeros(2), values(5, 2)[2:].sum(0)])
        torch.testing.assert_close(summed, expected)
        assert torch.autograd.gradcheck(segment_sum, (values(5, 2), LENGTHS))

    def test_segment_softmax(self) -> None:
        scores = (values(5) * 300).detach().requires_grad_()  # a plain exp would overflow
        expected = torch.cat([torch.softmax(scores[:2], 0), torch.softmax(scores[2:], 0)])
        torch.testing.assert_close(segment_softmax(scores, LENGTHS), expected)
        assert torch.autograd.gradcheck(segment_softmax, (values(5), LENGTHS))

    def test_segment_max(self) -> None:
        rows = (values(5, 2) - 10).detach().requires_grad_()  # all negative: zero is not their maximum
        expected = torch.stack([rows[:2].amax(0), torch.zeros(2), rows[2:].amax(0)])
        torch.testing.assert_close(segment_max(rows, LENGTHS), expected)
        assert torch.autograd.gradcheck(segment_max, (rows, LENGTHS))
        equal = torch.ones(5, 1, requires_grad=True)
        segment_max(equal, LENGTHS).sum().backward()
        assert equal.grad is not None
        torch.testing.assert_close(equal.grad.squeeze(1), torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3]))


TWO_IDS = Schema(fields=(Field(name="user", side="user", kind="id"), Field(name="ad", side="ad", kind="id")))


def drawn_rows(count: int, width: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 + 3 * torch.randn(count, width, generator=generator, dtype=torch.float64)).requires_grad_()


def norm_of() -> GlobalBatchNorm:
    return GlobalBatchNorm(3, StepPlace(), "step.norm.1").double()


class TestBatchNorm:
    def test_is_torch_s_in_training_and_evaluation(self) -> None:
        mine, theirs = norm_of(), nn.BatchNorm1d(3).double()
        for step in range(4):
            one, other = drawn_rows(5 + step, seed=step), drawn_rows(5 + step, seed=step)
            weight = drawn_rows(5 + step, seed=9)
            (mine(one) * weight).sum().backward()
            (theirs(other) * weight).sum().backward()
            torch.testing.assert_close(one.grad, other.grad)
        for name in ("weight", "bias"):
            torch.testing.assert_close(getattr(mine, name).grad, getattr(theirs, name).grad)
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name))
        torch.testing.assert_close(mine.eval()(drawn_rows(4)), theirs.eval()(drawn_rows(4)))

    def test_no_row_at_all_moves_nothing(self) -> None:
        norm, none = norm_of(), drawn_rows(0)
        norm(none).sum().backward()
        assert norm.running_mean.tolist() == [0, 0, 0]
        assert norm.running_var.tolist() == [1, 1, 1]

    def test_one_row_is_finite(self) -> None:
        norm = norm_of()
        assert norm(drawn_rows(1)).tolist() == [[0, 0, 0]]
        assert norm.running_var.isfinite().all()


class TestDropout:
    def test_share_and_scale(self) -> None:
        dropped = PlacedDropout(0.3, StepPlace(place_B=np.arange(1000)), layer=1)(torch.ones(1000, 50))
        assert float((dropped == 0).double().mean()) == pytest.approx(0.3, abs=0.01)
        assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7], abs=1e-4)

    @pytest.mark.parametrize("other", [{"seed": 1}, {"step": 1}])
    def test_every_step_layer_and_seed_drops_others(self, other: dict[str, int]) -> None:
        ones, place = torch.ones(20, 20), StepPlace(place_B=np.arange(20))
        usual = PlacedDropout(0.5, place, layer=1)
        assert not torch.equal(usual(ones), PlacedDropout(0.5, replace(place, **other), layer=1)(ones))
        assert not torch.equal(usual(ones), PlacedDropout(0.5, place, layer=2)(ones))
        assert torch.equal(usual(ones), PlacedDropout(0.5, replace(place), layer=1)(ones))


def names_of(**settings: object) -> set[str]:
    return set(build_model(TWO_IDS, ModelConfig.model_validate({"images": "none", **settings})).state_dict())


def test_names_of_parameters_are_the_same_with_any_setting() -> None:
    usual, prelu = names_of(), names_of(activation="prelu")
    assert names_of(dropout=0.2) == usual
    assert usual < prelu < names_of(activation="prelu", dropout=0.2, batch_norm=True)


def test_order_of_the_layers() -> None:
    config = ModelConfig(activation="relu", batch_norm=True, dropout=0.1)
    mlp = Mlp([5, 4, 3, 1], HiddenLayers(config, StepPlace()))
    kinds = [type(layer).__name__ for layer in mlp]
    assert kinds == [*["Linear", "GlobalBatchNorm", "ReLU", "PlacedDropout"] * 2, "Linear"]


def test_starts() -> None:
    torch.manual_seed(0)
    wide = {"images": "none", "mlp": [300], "id_width": 100}
    xavier, plain = (
        build_model(TWO_IDS, ModelConfig.model_validate({**wide, "init": init})) for init in ("xavier", "torch")
    )
    assert float(xavier.mlp[0].weight.detach().std()) == pytest.approx((2 / (200 + 300)) ** 0.5, rel=0.02)
    assert not xavier.mlp[0].bias.detach().any()
    assert (
        float(plain.mlp[0].weight.detach().abs().max()) <= 200**-0.5 < float(xavier.mlp[0].weight.detach().abs().max())
    )
    assert plain.mlp[0].bias.detach().all()


def test_logistic_regression_starts_as_torchs_layers_do() -> None:
    starts = []
    for init in ("xavier", "torch"):
        torch.manual_seed(0)
        starts.append(build_model(load_schema(), ModelConfig.model_validate({"base": "lr", "init": init})).state_dict())
    assert len(starts[0]) > 2, "its attention to images is there"
    torch.testing.assert_close(*starts, rtol=0, atol=0)
