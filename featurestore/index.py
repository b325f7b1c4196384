"""The one door to faiss: ranges of a scalar quantiser, residual quantisers, and exact nearest neighbours.

Letters of shapes: N rows, K queries, D feature width; of a residual quantiser L levels, C codes of each.
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


def train_residual_quantizer(
    sample_ND: npt.NDArray[np.float32], num_levels: int, num_codes: int, seed: int
) -> npt.NDArray[np.float32]:
    """Codebooks of faiss's ResidualQuantizer, (L, C, D): the first is trained on the sample, each further one on what
    is left after the levels before it.

    The nearest code wins at every level (a beam of one), so that a prefix of codes never depends on later levels.
    `num_codes` is a power of two, and the sample has at least so many rows. k-means, 25 passes a level.
    """
    quantizer = faiss.ResidualQuantizer(sample_ND.shape[1], num_levels, num_codes.bit_length() - 1)
    quantizer.max_beam_size = 1
    quantizer.train_type = faiss.ResidualQuantizer.Train_progressive_dim | faiss.ResidualQuantizer.Skip_codebook_tables
    quantizer.cp.seed = seed
    quantizer.cp.min_points_per_centroid = 1  # else it warns on stderr
    quantizer.train(np.ascontiguousarray(sample_ND, np.float32))
    codebooks = faiss.vector_to_array(quantizer.codebooks).reshape(num_levels, num_codes, -1)
    return np.asarray(codebooks, np.float32)


def encode_residual(
    codebooks_LCD: npt.NDArray[np.float32], rows_ND: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Codes of the rows, (N, L), and the squared length of what is left of each row after every level, (N, L)."""
    residual_ND = np.array(rows_ND, np.float32, order="C")
    shape = len(residual_ND), len(codebooks_LCD)
    codes_NL, left_NL = np.empty(shape, np.int64), np.empty(shape, np.float64)
    for level, codebook_CD in enumerate(codebooks_LCD):
        codes_NL[:, level] = nearest(codebook_CD, residual_ND, 1)[:, 0]
        residual_ND -= codebook_CD[codes_NL[:, level]]
        left_NL[:, level] = np.einsum("nd,nd->n", residual_ND, residual_ND, dtype=np.float64)
    return codes_NL, left_NL
