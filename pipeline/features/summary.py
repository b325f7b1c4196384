"""What an extraction or a refresh did, in numbers and as the text that its job prints."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.features.part import BadImage


@dataclass(frozen=True)
class RefreshSummary:
    """Counts of one run. Each image of the listing is one of new, changed, touched, unchanged and bad.

    With `is_dry` they are what the run would have done.
    """

    num_images: int  # listed
    num_ignored: int  # files that are no images by their extension, or repeated rows of a table
    num_new: int  # the store did not have them
    num_changed: int  # the store had other bytes
    num_touched: int  # the store has these bytes under another tag; the feature stays
    num_unchanged: int
    num_gone: int  # rows removed because their image is not listed any more
    num_kept: int  # rows that stay though their image is not listed
    num_resolved: int  # were in quarantine and are good now
    num_computed: int  # new and changed images through the network, earlier, killed runs' included
    num_duplicates: int  # new and changed images whose feature is that of an image of equal bytes
    num_resumed: int  # staged by an earlier, killed run
    bad: tuple[BadImage, ...]  # in quarantine after the run, of the images listed
    seconds: float
    store: str
    snapshot: int  # version after the run
    is_dry: bool = False

    @property
    def images_per_s(self) -> float:
        """New, changed and bad images that this run itself worked on, in a second."""
        return max(0, self.num_images - self.num_unchanged - self.num_touched - self.num_resumed) / max(
            self.seconds, 1e-9
        )


def describe(summary: RefreshSummary) -> str:
    """The lines that a job prints."""
    kept = f" ({summary.num_kept:,} not listed, kept)" if summary.num_kept else ""
    lines = [
        f"images       {summary.num_images:,} ({summary.num_ignored:,} other files ignored)",
        f"new          {summary.num_new:,}",
        f"changed      {summary.num_changed:,}",
        f"touched      {summary.num_touched:,} (other date or tag, same bytes)",
        f"unchanged    {summary.num_unchanged:,}",
        f"gone         {summary.num_gone:,}{kept}",
        f"quarantined  {len(summary.bad):,}{': ' + describe_bad(summary.bad) if summary.bad else ''}",
        f"resolved     {summary.num_resolved:,} (were in quarantine)",
        f"duplicates   {summary.num_duplicates:,} (feature copied from equal bytes)",
        f"computed     {summary.num_computed:,} ({summary.num_resumed:,} images staged by an earlier run)",
        f"time         {summary.seconds:.1f} s, {summary.images_per_s:.1f} images/s",
        f"store        {summary.store}, snapshot {summary.snapshot}",
    ]
    if summary.is_dry:
        lines.append("dry run      nothing was written")
    return "\n".join(lines)


def describe_bad(bad: Sequence[BadImage], num_names: int = 3) -> str:
    """Reasons with their numbers and the first names."""
    texts = []
    for reason, count in Counter(image.reason for image in bad).most_common():
        names = [image.uri for image in bad if image.reason == reason]
        more = ", …" if count > num_names else ""
        texts.append(f"{count:,} {reason} ({', '.join(names[:num_names])}{more})")
    return "; ".join(texts)
