"""Objects that the garbage collector of a process of tests passes over, as long as it lives."""

import gc

count = gc.get_freeze_count


def freeze_for_good() -> None:
    """Freeze what is there now; a run says no more than that something is frozen, and does not count it.

    To count a million objects takes a tenth of a second, and each run of the tests would. Cycles that are garbage by
    now stay too: to find them takes half a second, and imports leave few.
    """
    gc.freeze()
    gc.get_freeze_count = lambda: 1
