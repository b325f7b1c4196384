"""Models with drawn weights, drawn inputs of some users, and the logits that the trainer's own code makes of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from serving.network.served import FieldRows, NetworkInputs
from trainer.config import ModelConfig
from trainer.exchange.vectors import FieldVectors
from trainer.models.ctr import CtrModel
from trainer.models.layers import width_of
from trainer.models.nets import build_model
from trainer.schema.fields import Field, Schema

_PAIRED = ("behavior_item", "behavior_shop", "behavior_age")
"""What DIN takes value by value."""


def schema() -> Schema:
    """A field of every kind on both sides, with weights and of two contents."""
    return Schema(
        fields=(
            Field(name="user", side="user", kind="id"),
            Field(name="age", side="user", kind="dense"),
            Field(name="interests", side="user", kind="multi_id", weights="interest_weights", width=2),
            Field(name="behavior_item", side="user", kind="multi_id", table="item", width=4),
            Field(name="behavior_shop", side="user", kind="multi_id", table="shop"),
            Field(name="behavior_age", side="user", kind="multi_id", beside="behavior_item", buckets=4),
            Field(name="behavior_image", side="user", kind="content"),
            Field(name="ad_item", side="ad", kind="id", table="item", width=4),
            Field(name="ad_shop", side="ad", kind="id", table="shop", weights="shop_weight"),
            Field(name="ad_tags", side="ad", kind="multi_id", weights="tag_weights"),
            Field(name="ad_words", side="ad", kind="multi_id"),
            Field(name="scene", side="ad", kind="id", context=True),
            Field(name="price", side="ad", kind="dense", width=2),
            Field(name="ad_image", side="ad", kind="content"),
            Field(name="behavior_title", side="user", kind="content", store="titles", width=2),
            Field(name="ad_title", side="ad", kind="content", store="titles", width=2),
        )
    )


def config(**settings: object) -> ModelConfig:
    small = {"id_width": 3, "visual_width": 5, "mlp": [6], "attention_hidden": 4}
    return ModelConfig.model_validate({**small, "pooling_length": 20, **settings})


def model_of(fields: Schema, settings: ModelConfig) -> CtrModel:
    """A model none of whose parameters and running values is where it starts."""
    torch.manual_seed(0)
    model = build_model(fields, settings).eval()
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            is_variance = bool((value == 1).all())
            value.add_(torch.randn_like(value) * 0.2)
            if is_variance:
                value.abs_()
    return model


@dataclass
class Drawn:
    """Draws inputs of a model: for each user so many candidates, and so many values in each list."""

    model: CtrModel
    settings: ModelConfig
    seed: int = 0

    def __call__(self, candidates: Sequence[int], behaviors: Sequence[int]) -> NetworkInputs:
        self.rng = np.random.default_rng(self.seed)
        num_groups, num_samples = len(candidates), sum(candidates)
        group_of_sample_B = np.repeat(np.arange(num_groups), candidates)
        fields, dense = {}, {}
        for number, field in enumerate(self.model.fields):
            rows = num_groups if field.side == "user" else num_samples
            if field.kind == "dense":
                dense[field.name] = self._reals(rows, width_of(field, self.settings))
                continue
            lengths_M = np.ones(rows, np.int64)
            if field.side == "user" and field.kind != "id":
                longer = 0 if field.name in _PAIRED else number
                lengths_M = np.array([length and length + longer for length in behaviors], np.int64)
            elif field.kind == "multi_id":
                lengths_M = self.rng.integers(0, 4, rows)
            fields[field.name] = self._rows(field, lengths_M)
        return NetworkInputs(group_of_sample_B=group_of_sample_B, num_groups=num_groups, fields=fields, dense=dense)

    def _rows(self, field: Field, lengths_M: np.ndarray) -> FieldRows:
        count = int(lengths_M.sum())
        rows_NV = self._reals(count, width_of(field, self.settings))
        if field.name == "ad_item":
            rows_NV[::3] *= 1e-7  # new ads, for model.image_dropout
        weights_N = self._reals(count) if field.weights else None
        return FieldRows(rows_NV=rows_NV, lengths_M=lengths_M, weights_N=weights_N)

    def _reals(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape, dtype=np.float32) * np.float32(0.3)


@torch.no_grad()
def trainers_logits(model: CtrModel, inputs: NetworkInputs) -> np.ndarray:
    """What the trainer's code makes of all users at once, as trainer.engine does it."""
    vectors, dense = {}, {name: torch.from_numpy(values) for name, values in inputs.dense.items()}
    for field in model.fields:
        if field.kind == "dense":
            continue
        given = inputs.fields[field.name]
        rows_NV, lengths_M = torch.from_numpy(given.rows_NV), torch.from_numpy(given.lengths_M)
        vectors[field.name] = FieldVectors(rows_NV, torch.arange(len(rows_NV)), lengths_M)
        if given.weights_N is not None:
            vectors[field.name].weights_N = torch.from_numpy(given.weights_N)
    return model(model.with_pictures_of_ads(vectors), dense, torch.from_numpy(inputs.group_of_sample_B)).numpy()
