"""Layers against what plain loops over rows give, empty rows and batches included."""

from collections.abc import Callable

import pytest
import torch

from trainer.config.options import ModelConfig
from trainer.exchange.vectors import take_rows
from trainer.models.layers import HiddenLayers, Mlp, StepPlace, expand_rows, segment_max, segment_softmax, segment_sum

LENGTHS = torch.tensor([2, 0, 3])
INDEX = torch.tensor([1, 1, 0, 3, 1])


def values(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


class TestLayers:
    def test_take_rows(self) -> None:
        vectors = values(4, 3)
        assert torch.equal(take_rows(vectors, INDEX), vectors[INDEX])
        assert torch.autograd.gradcheck(take_rows, (vectors, INDEX))

    def test_take_rows_sums_gradients_in_order(self) -> None:
        vectors = torch.zeros(2, 1, requires_grad=True)
        weight = torch.tensor([[1e8], [1.0], [-1e8], [1.0]])
        (take_rows(vectors, torch.tensor([0, 0, 0, 1])) * weight).sum().backward()
        assert vectors.grad is not None
        assert vectors.grad.tolist() == [[(torch.tensor(1e8) + 1 - 1e8).item()], [1.0]]

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

    @pytest.mark.parametrize("reduce", [segment_sum, segment_max])
    @pytest.mark.parametrize("num_rows", [0, 2])
    def test_nothing_keeps_the_graph(
        self, num_rows: int, reduce: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> None:
        vectors, none = values(4, 3), torch.zeros(0, dtype=torch.int64)
        lengths = torch.zeros(num_rows, dtype=torch.int64)
        pooled = reduce(take_rows(vectors, none), lengths)
        assert pooled.shape == (num_rows, 3)
        pooled.sum().backward()
        assert vectors.grad is not None and not vectors.grad.any()

    def test_mlp_ends_linear(self) -> None:
        mlp = Mlp([5, 4, 3, 1], HiddenLayers(ModelConfig(activation="prelu"), StepPlace()))
        kinds = [type(layer).__name__ for layer in mlp]
        assert kinds == ["Linear", "PReLU", "Linear", "PReLU", "Linear"]
