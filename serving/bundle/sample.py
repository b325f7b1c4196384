"""A sample of a run's test groups, stored in a bundle to measure changes of scores."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.errors import StorageError
from featurestore.text import one_line
from serving.bundle.files import WrittenFiles
from serving.bundle.manifest import SAMPLE
from trainer.comm import SoloComm
from trainer.errors import TrainerError
from trainer.runs.saved import SavedRun, open_test
from trainer.samples.columns import rules_of, source_columns
from trainer.samples.index import read_row_group

_MOST_ROW_GROUPS = 8


def write_sample(saved: SavedRun, files: WrittenFiles, num_groups: int) -> str | None:
    """Write `num_groups` sample groups, spread over the run's test samples, with the columns that the schema reads.

    If there are none, returns the reason; a bundle without them is still complete."""
    if num_groups == 0:
        return "none were asked for"
    try:
        index = open_test(SoloComm(), saved.config, saved.schema, None)
        count = min(_MOST_ROW_GROUPS, len(index.row_groups))
        chosen = np.linspace(0, len(index.row_groups) - 1, count).astype(int)
        columns = list(source_columns(rules_of(saved.schema)))
        tables = [read_row_group(index.storage, index.row_groups[n], columns) for n in chosen]
    except (TrainerError, StorageError, pa.ArrowException) as error:
        return one_line(error)
    share = -(-num_groups // count)
    rows = pa.concat_tables([table.slice(0, share) for table in tables], promote_options="permissive")
    with files.output(SAMPLE) as output:
        pq.write_table(rows.slice(0, num_groups), output, compression="zstd")
    return None
