"""Tables of scores and of raw logs, as pandas or Arrow has them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.samples.columns import is_pandas, table_of

Scores = Any
"""A pandas DataFrame where one was given, with its index; else an Arrow table."""


def scores_of(data: Any, logits: Sequence[NDArray[Any]]) -> Scores:
    """Make a table of the logits and click probabilities of each row's ads, as a DataFrame where `data` is one."""
    logit_B = np.concatenate([np.empty(0, np.float32), *logits]).astype(np.float32)
    probability_B = (1 / (1 + np.exp(-np.maximum(logit_B.astype(np.float64), -700)))).astype(np.float32)
    columns = {"logit": logit_B, "probability": probability_B}
    if not is_pandas(data):
        return pa.table({name: pa.array(values) for name, values in columns.items()})
    import pandas as pd

    return pd.DataFrame(columns, index=data.index.repeat([len(each) for each in logits]))


def with_behaviors(impressions: Any, behaviors: Any, samples: str = "data/samples") -> Any:
    """Make rows to score of a raw log: impressions, each with the user's behaviours before it, in their order.

    Both are tables as the logs that `samples` were made from: windows, limits and mapping are theirs. Raises
    SampleError for a row that a job would quarantine.
    """
    from pipeline.samples.requests import requests_of_log

    rows = requests_of_log(table_of(impressions), table_of(behaviors), str(samples))
    return rows.to_pandas().set_index(impressions.index) if is_pandas(impressions) else rows
