"""Dropout in E: which numbers of an image are dropped, by the stream's name, the image's key and the column alone.

So an image has one mask wherever its owner is, and whatever else its owner serves. Letters as in embedding.py; W
columns.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featurestore.keys import splitmix64, stream_start

_LEVELS = 256  # of a random byte


@dataclass
class EmbeddingDropout:
    """The share of the outputs of each of E's hidden layers that are zero; `step` is set before each step.

    What is left grows by 1 / (1 - share).
    """

    seed: int
    hidden: float = 0.0
    step: int = 0

    def kept(self, name: str, keys_Q: NDArray[np.int64], width: int, share: float) -> tuple[NDArray[np.bool_], float]:
        """Return which of `width` columns are kept of each key, (Q, width), and what they are multiplied by.

        `name` names the network and the layer. The share is rounded to a 256th.
        """
        below = round(share * _LEVELS)
        start = stream_start(f"{self.seed}/embedding_dropout/{self.step}/{name}")
        of_key_Q1 = splitmix64((splitmix64(keys_Q) + start).view(np.int64))[:, None]
        words_QW = splitmix64((of_key_Q1 + np.arange(-(-width // 8), dtype=np.uint64)).view(np.int64))
        drawn_QW = words_QW.astype("<u8", copy=False).view(np.uint8)[:, :width]
        return drawn_QW >= below, _LEVELS / (_LEVELS - below)
