"""Timing of variants against each other on a machine that is never quite still."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping

from rich.progress import Progress


def interleaved_medians(
    variants: Mapping[str, Callable[[], object]],
    repeats: int,
    progress: Progress,
    before_each: Callable[[], object] | None = None,
) -> dict[str, float]:
    """Median seconds of each variant. Every round runs each of them once, so that a slow moment hits all alike.

    `before_each` runs, untimed, before every single run: to draw new keys, or to empty a folder. One round warms up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    task = progress.add_task(" / ".join(variants), total=repeats + 1)
    for round_ in range(repeats + 1):
        for name, run in variants.items():
            if before_each is not None:
                before_each()
            gc.collect(0)
            start = time.perf_counter()
            result = run()
            elapsed = time.perf_counter() - start
            del result
            if round_:
                seconds[name].append(elapsed)
        progress.advance(task)
    return {name: statistics.median(values) for name, values in seconds.items()}
