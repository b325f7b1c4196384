"""The one door to faiss: ranges of a scalar quantiser, and exact nearest neighbours.

Letters of shapes: N rows, K queries, D feature width.
"""

from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

_LARGEST_CODE = 255


def train_ranges(sample_ND: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Minimum and width of each dimension's range, float32 (2, D), for codes of 8 bits: faiss's QT_8bit.

    faiss takes the smallest and the largest number of the sample; its codes are cut off, and stand for the middles of
    255 steps. So the range is moved down by half a step: codes then round to nearest, both ends of the sample decode to
    themselves, and the zeros that a ReLU leaves stay zeros. The parameters are still faiss's: it decodes them alike.
    """
    quantizer = faiss.ScalarQuantizer(sample_ND.shape[1], faiss.ScalarQuantizer.QT_8bit)
    quantizer.train(np.ascontiguousarray(sample_ND, np.float32))
    minimum_D, range_D = faiss.vector_to_array(quantizer.trained).reshape(2, -1).astype(np.float64)
    return np.stack([minimum_D - range_D * (0.5 / _LARGEST_CODE), range_D]).astype(np.float32)


def nearest(rows_ND: npt.NDArray[np.float32], queries_KD: npt.NDArray[np.float32], count: int) -> npt.NDArray[Any]:
    """Of each query the `count` nearest rows by Euclidean distance, nearest first, (K, count). Looks at every row."""
    index = faiss.IndexFlatL2(rows_ND.shape[1])
    index.add(np.ascontiguousarray(rows_ND, np.float32))
    _, found = index.search(np.ascontiguousarray(queries_KD, np.float32), count)
    return np.asarray(found)
