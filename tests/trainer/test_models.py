"""Layers, aggregators and DICM against what plain loops over rows give, empty rows and batches included."""

import pytest
import torch

from trainer.errors import ConfigError
from trainer.exchange import FieldVectors
from trainer.models.aggregators import AttentivePooling, SumPooling, sum_pool
from trainer.models.dicm import Dicm, used_fields
from trainer.models.layers import Mlp, expand_rows, segment_softmax, segment_sum, take_rows
from trainer.options import ModelConfig
from trainer.schema import Field, Schema

LENGTHS = torch.tensor([2, 0, 3])
INDEX = torch.tensor([1, 1, 0, 3, 1])
GROUPS = torch.tensor([0, 0, 1, 2, 2])


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

    def test_expand_rows_and_segment_sum(self) -> None:
        rows = values(3, 2)
        assert torch.equal(expand_rows(rows, LENGTHS), rows[[0, 0, 2, 2, 2]])
        assert torch.autograd.gradcheck(expand_rows, (rows, LENGTHS))
        summed = segment_sum(values(5, 2), LENGTHS)
        expected = torch.stack([values(5, 2)[:2].sum(0), torch.zeros(2), values(5, 2)[2:].sum(0)])
        torch.testing.assert_close(summed, expected)
        assert torch.autograd.gradcheck(segment_sum, (values(5, 2), LENGTHS))

    def test_segment_softmax(self) -> None:
        scores = (values(5) * 300).detach().requires_grad_()  # a plain exp would overflow
        expected = torch.cat([torch.softmax(scores[:2], 0), torch.softmax(scores[2:], 0)])
        torch.testing.assert_close(segment_softmax(scores, LENGTHS), expected)
        assert torch.autograd.gradcheck(segment_softmax, (values(5), LENGTHS))

    @pytest.mark.parametrize("num_rows", [0, 2])
    def test_nothing_keeps_the_graph(self, num_rows: int) -> None:
        vectors, none = values(4, 3), torch.zeros(0, dtype=torch.int64)
        lengths = torch.zeros(num_rows, dtype=torch.int64)
        pooled = segment_sum(take_rows(vectors, none), lengths)
        assert pooled.shape == (num_rows, 3)
        pooled.sum().backward()
        assert vectors.grad is not None and not vectors.grad.any()

    def test_mlp_ends_linear(self) -> None:
        kinds = [type(layer).__name__ for layer in Mlp([5, 4, 3, 1])]
        assert kinds == ["Linear", "PReLU", "Linear", "PReLU", "Linear"]


class TestPooling:
    def test_sum_pool(self) -> None:
        vectors = values(4, 3)
        pooled = sum_pool(FieldVectors(vectors, INDEX, LENGTHS))
        expected = torch.stack([2 * vectors[1], torch.zeros(3), vectors[0] + vectors[3] + vectors[1]])
        torch.testing.assert_close(pooled, expected)
        per_sample = SumPooling(3)(FieldVectors(vectors, INDEX, LENGTHS), GROUPS, None)
        torch.testing.assert_close(per_sample, expected[GROUPS])

    def test_attentive_weighs_by_the_ad(self) -> None:
        pool = AttentivePooling(3, query_width=2, hidden=4).double()
        vectors, query = values(4, 3), values(5, 2)
        pooled = pool(FieldVectors(vectors, INDEX, LENGTHS), GROUPS, query)
        for sample, (group, begin, end) in enumerate([(0, 0, 2), (0, 0, 2), (1, 2, 2), (2, 2, 5), (2, 2, 5)]):
            keys = vectors[INDEX[begin:end]]
            assert len(keys) == LENGTHS[group]
            product = keys * pool.match(query[sample])
            hidden = pool.of_key(keys) + pool.of_query(query[sample]) + pool.of_product(product)
            weight = torch.softmax(pool.score(pool.activation(hidden)).squeeze(1), 0)
            torch.testing.assert_close(pooled[sample], (weight.unsqueeze(1) * keys).sum(0))
        assert not torch.allclose(pooled[3], pooled[4])
        assert torch.autograd.gradcheck(
            lambda v, q: pool(FieldVectors(v, INDEX, LENGTHS), GROUPS, q), (vectors, query), atol=1e-6
        )


SCHEMA = Schema(
    fields=(
        Field(name="user", side="user", kind="id"),
        Field(name="behavior_image", side="user", kind="content"),
        Field(name="ad_item", side="ad", kind="id", width=4),
        Field(name="price", side="ad", kind="dense", width=2),
        Field(name="ad_image", side="ad", kind="content"),
    )
)


def config(**settings: object) -> ModelConfig:
    return ModelConfig.model_validate({"id_width": 3, "visual_width": 5, "mlp": [6], **settings})


class TestDicm:
    @pytest.mark.parametrize(
        ("images", "inputs", "query"),
        [("none", 3 + 4 + 2, None), ("ad", 9 + 5, None), ("behavior", 9 + 5, 4 + 2), ("both", 9 + 10, 5)],
    )
    def test_widths(self, images: str, inputs: int, query: int | None) -> None:
        model = Dicm(SCHEMA, config(images=images))
        assert model.mlp[0].in_features == inputs
        pools = list(model.aggregators.values())
        assert [p.of_query.in_features for p in pools] == ([query] if query else [])

    @pytest.mark.parametrize("pooling", ["sum", "attentive"])
    @pytest.mark.parametrize("num_samples", [0, 5])
    def test_a_logit_for_each_sample(self, pooling: str, num_samples: int) -> None:
        model = Dicm(SCHEMA, config(pooling=pooling))
        groups = 3 if num_samples else 0

        def field(width: int, rows: int) -> FieldVectors:
            vectors = torch.randn(7 if rows else 0, width, requires_grad=True)
            return FieldVectors(vectors, torch.arange(rows), torch.ones(rows, dtype=torch.int64))

        fields = {"user": field(3, groups), "ad_item": field(4, num_samples), "ad_image": field(5, num_samples)}
        fields["behavior_image"] = field(5, groups)
        logit = model(fields, {"price": torch.ones(num_samples, 2)}, GROUPS[:num_samples])
        assert logit.shape == (num_samples,)
        logit.sum().backward()
        assert all(f.vectors_UV.grad is not None for f in fields.values())
        assert all(p.grad is not None for p in model.parameters())

    def test_images_without_a_content_field(self) -> None:
        schema = Schema(fields=(Field(name="user", side="user", kind="id"),))
        with pytest.raises(ConfigError, match=r"model\.images=ad needs a field of kind content on side ad"):
            used_fields(schema, config(images="ad"))
        assert len(used_fields(schema, config(images="none"))) == 1

    def test_nothing_to_ask_with(self) -> None:
        schema = Schema(fields=(Field(name="behavior_image", side="user", kind="content"),))
        with pytest.raises(ConfigError, match=r"model\.pooling=attentive needs a field on side ad"):
            Dicm(schema, config(images="behavior"))

    def test_no_field_with_a_key(self) -> None:
        schema = Schema(fields=(Field(name="price", side="ad", kind="dense"),))
        with pytest.raises(ConfigError, match="no field of kind id, multi_id or content"):
            used_fields(schema, config(images="none"))
