"""The counts in the summary of samples."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.samples.files import FORMAT, GroupedBucket, WrittenFile
from pipeline.samples.shuffle import ShuffledPiece


def summarise(
    options: Mapping[str, Any],
    shown: Sequence[ShuffledPiece],
    done: Sequence[ShuffledPiece],
    grouped: Sequence[GroupedBucket],
    written: Sequence[WrittenFile],
) -> dict[str, Any]:
    """Count what became of every row of the impressions (`shown`) and behaviours (`done`), and the samples.

    `rows` is the sum of the counts of its log from `kept` or `used` to `quarantined`; `examples` has a bad value for
    each reason, and `without_image` counts good rows that name no image. `used` behaviours are in at least one group;
    one can be in many, so `behaviors_in_groups` counts it again.
    """
    rows_shown, bad_shown = _rows(shown)
    rows_done, bad_done = _rows(done)
    num_short = sum(part.num_short for part in done)
    distinct_shown = sum(part.num_impressions for part in grouped)
    distinct_done, used = sum(part.num_behaviors for part in grouped), sum(part.num_used for part in grouped)
    return {
        "format": FORMAT,
        "options": dict(options),
        "impressions": {
            "rows": rows_shown,
            "kept": distinct_shown,
            "duplicates": rows_shown - bad_shown.total() - distinct_shown,
            "quarantined": dict(sorted(bad_shown.items())),
            "examples": examples_of(shown),
            "without_image": sum(part.num_without_image for part in shown),
        },
        "behaviors": {
            "rows": rows_done,
            "used": used,
            "unused": distinct_done - used,
            "short_dwell": num_short,
            "duplicates": rows_done - bad_done.total() - num_short - distinct_done,
            "quarantined": dict(sorted(bad_done.items())),
            "examples": examples_of(done),
            "without_image": sum(part.num_without_image for part in done),
        },
        "users": sum(part.num_users for part in grouped),
        "groups": sum(part.num_groups for part in written),
        "groups_without_behaviors": sum(part.num_without for part in grouped),
        "behaviors_in_groups": sum(part.num_references for part in grouped),
        "behaviors_over_limit": sum(part.num_over_limit for part in grouped),
        **{split: _split(written, split) for split in ("train", "test")},
        "new_ads": _new_ads(written),
        "groups_of_file": {part.plan.name: part.num_groups for part in written},
    }


def bad_reasons(counts: Mapping[str, int], examples: Mapping[str, str]) -> str:
    """List reasons of bad rows, the most frequent first, with counts and a value as an example."""
    ordered = sorted(counts.items(), key=lambda each: -each[1])
    return ", ".join(f"{why}: {count:,}{f', as {examples[why]}' if why in examples else ''}" for why, count in ordered)


def _rows(parts: Sequence[ShuffledPiece]) -> tuple[int, Counter[str]]:
    bad = sum((part.quarantined for part in parts), Counter[str]())
    return sum(part.num_rows for part in parts), bad


def examples_of(parts: Sequence[ShuffledPiece]) -> dict[str, str]:
    """Give a bad value for each reason: that of the first piece which has one."""
    found: dict[str, str] = {}
    for part in parts:
        found = {**part.examples, **found}
    return dict(sorted(found.items()))


def _split(written: Sequence[WrittenFile], split: str) -> dict[str, Any]:
    files = [part for part in written if part.plan.split == split]
    days = sorted({part.plan.day for part in files})
    impressions = sum(part.num_impressions for part in files)
    return {
        "first_day": days[0] if days else None,
        "last_day": days[-1] if days else None,
        "days": len(days),
        "files": len(files),
        "groups": sum(part.num_groups for part in files),
        "impressions": impressions,
        "ads": len(_items(files)[0]),
        "positive_rate": _share(sum(part.num_clicks for part in files), impressions),
    }


def _new_ads(written: Sequence[WrittenFile]) -> dict[str, Any]:
    """Count the ads (items) of the test days that were never shown on the training days."""
    known, _ = _items([part for part in written if part.plan.split == "train"])
    items, counts = _items([part for part in written if part.plan.split == "test"])
    is_new = ~np.isin(items, known)
    return {
        "ads": int(is_new.sum()),
        "share_of_test_ads": _share(int(is_new.sum()), len(items)),
        "share_of_test_impressions": _share(int(counts[is_new].sum()), int(counts.sum())),
    }


def _items(files: Sequence[WrittenFile]) -> tuple[np.ndarray, np.ndarray]:
    """List the distinct items of the files' ads, and count impressions of each."""
    if not files:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    items, inverse = np.unique(np.concatenate([part.items for part in files]), return_inverse=True)
    counts = np.zeros(len(items), np.int64)
    np.add.at(counts, inverse, np.concatenate([part.impressions_of_item for part in files]))
    return items, counts


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
