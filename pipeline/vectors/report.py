"""What an import did, as the text that its job prints."""

from pipeline.features.part import BadImage
from pipeline.features.summary import describe_bad
from pipeline.vectors.import_vectors import ImportSummary


def describe(summary: ImportSummary) -> str:
    """The lines that the job prints."""
    kept = f" ({summary.num_kept:,} not in the source, kept)" if summary.num_kept else ""
    bad = f": {describe_bad([BadImage(*row) for row in summary.bad])}" if summary.bad else ""
    lines = [
        f"rows         {summary.num_rows:,}",
        f"new          {summary.num_new:,}",
        f"changed      {summary.num_changed:,}",
        f"unchanged    {summary.num_unchanged:,}",
        f"duplicates   {summary.num_duplicates:,} (repeated with the same numbers)",
        f"gone         {summary.num_gone:,}{kept}",
        f"quarantined  {len(summary.bad):,}{bad}",
        f"resolved     {summary.num_resolved:,} (were in quarantine)",
        f"resumed      {summary.num_resumed:,} (staged by an earlier run)",
        f"time         {summary.seconds:.1f} s, {summary.num_rows / max(summary.seconds, 1e-9):,.0f} rows/s",
        f"store        {summary.store}, snapshot {summary.snapshot}",
    ]
    return "\n".join(lines)
