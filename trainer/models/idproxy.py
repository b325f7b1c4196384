"""A stand-in for the IDs of an ad: what its visual vectors say about them is added to their vectors (model.id_proxy).

A new ad has a picture and no trained ID, so its ID vectors are near zero, where the networks hardly ever see them in
training. Here the vector of each of its own IDs is p(v) + row: p a small net of the ad's visual vectors v, learned from
clicks with all else, as in IDProxy (arXiv 2603.01590). The row learns what the picture does not say of this ad; a new
ad has p(v) and a row near zero, or in an exact table the trained row that ids without their own share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from trainer.config.options import ModelConfig
from trainer.exchange.exchange import FieldVectors
from trainer.exchange.sums import take_rows
from trainer.models.fields import width_of
from trainer.models.layers import expand_rows, lengths_of, value_rows
from trainer.schema import Field

HIDDEN = 32
"""Units of the net's hidden layer."""


class IdProxy(nn.Module):
    """p(v) + row in place of the rows of the ad's own IDs; of a field with several values, of each of them.

    Parameters: (V + 1) * 32 + 33 * W for each ID field of width W; V is the width of all of the ad's visual vectors.
    """

    def __init__(self, images: Sequence[Field], own_ids: Sequence[Field], config: ModelConfig) -> None:
        super().__init__()
        self._images = tuple(field.name for field in images)
        self._has_lists = {field.name: field.kind == "multi_id" for field in own_ids}
        width = sum(width_of(field, config) for field in images)
        self.nets = nn.ModuleDict(
            {
                field.name: nn.Sequential(
                    nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, width_of(field, config))
                )
                for field in own_ids
            }
        )

    def forward(self, fields: Mapping[str, FieldVectors]) -> dict[str, FieldVectors]:
        """Replace the vectors of the ad's own IDs; each value then has a vector of its own."""
        visual_BV = torch.cat([value_rows(fields[name]) for name in self._images], dim=1)
        result = dict(fields)
        for name, net in self.nets.items():
            field, proxy_NV = fields[name], net(visual_BV)
            if self._has_lists[name]:
                proxy_NV = expand_rows(proxy_NV, lengths_of(field.lengths_M), field.index_N.shape[0])
            rows_NV = take_rows(field.vectors_UV, field.index_N) + proxy_NV
            index_N = torch.arange(rows_NV.shape[0], device=rows_NV.device)
            result[name] = replace(field, vectors_UV=rows_NV, index_N=index_N)
        return result
