"""Galleries: the visual vectors of several images of one ad or behaviour become one, on the worker, after the exchange.

K ads or behaviours, N images of all of them; other letters as in trainer/samples/batch.py.
"""

import torch
from torch import Tensor

from trainer.exchange.exchange import FieldVectors, Lengths
from trainer.exchange.sums import take_rows
from trainer.models.layers import segment_max
from trainer.models.pooling.aggregators import mean_pool
from trainer.schema.fields import GalleryPooling


def gallery_vectors(images: FieldVectors, sizes_K: Tensor, lengths_M: Lengths, pooling: GalleryPooling) -> FieldVectors:
    """Make one vector for each ad or behaviour, which the model takes as that of one image.

    `sizes_K`, `lengths_M`: the gallery of `Batch.galleries`. An image that is twice in a gallery counts twice in its
    mean. A gallery without images is a vector of zeros, whatever data.missing says: there is no key that could lack a
    feature.
    """
    per_item = FieldVectors(images.vectors_UV, images.index_N, sizes_K)
    if pooling == "mean":
        vectors_KV = mean_pool(per_item)
    else:
        vectors_KV = segment_max(take_rows(per_item.vectors_UV, per_item.index_N), sizes_K)
    return FieldVectors(vectors_KV, torch.arange(sizes_K.shape[0], device=sizes_K.device), lengths_M)
