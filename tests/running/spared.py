"""What processes of tests are spared: a disk, races for stores, S3's description, pandas, garbage."""

import functools
import gc
import os
import shutil
import sys
from pathlib import Path

import psutil

from featurestore.storage import safety
from featurestore.storage.storage import Storage

WITHOUT_PANDAS = str(Path(__file__).with_name("without"))
"""A folder that comes before all others in the search for modules of processes that tests start."""
KNOWN_KINDS: set[str] = set()
"""Kinds of places where the short check has found nothing: the disk, and each server."""
MEMORY, ROOM = Path("/dev/shm"), 8 << 30
SELDOM_COLLECTED = (20_000, 20, 50)
"""In place of 700, 10 and 10 objects and rounds, by which the collector takes a sixteenth of the processor."""


def freeze_for_good() -> None:
    """Freeze what is there now; a run says no more than that something is frozen, and does not count it.

    To count a million objects takes a tenth of a second, and each run of the tests would. Cycles that are garbage by
    now stay too: to find them takes half a second, and imports leave few.
    """
    gc.freeze()
    gc.get_freeze_count = lambda: 1
    gc.set_threshold(*SELDOM_COLLECTED)


def spare_the_disk() -> None:
    """Let `os.fsync` return at once: no test cuts the power, and those that watch what is synced set their own.

    A sync takes most of the time of a small file. In processes that tests start, all is as ever.
    """

    def synced(descriptor: int) -> None:
        os.fstat(descriptor)  # it has to be open all the same

    os.fsync = synced


def keep_files_in_memory() -> None:
    """Put the folders of tests into Linux' memory, where it has room and nobody has named another place.

    Thousands of small files are made and removed, which takes a quarter of the time of tests of the store on a disk.
    """
    if MEMORY.is_mount() and min(shutil.disk_usage(MEMORY).free, psutil.virtual_memory().available) > ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def spare_pandas() -> None:
    """Let processes that tests start find no pandas, which is optional: pyarrow imports it where it makes an array.

    That is half a second for each process. This one has pandas.
    """
    search = os.environ.get("PYTHONPATH", "")
    if WITHOUT_PANDAS not in search:
        os.environ["PYTHONPATH"] = os.pathsep.join([WITHOUT_PANDAS, *filter(None, [search])])


@functools.cache
def parse_services_once() -> None:
    """Let each client of S3 take the descriptions of its service that the first one here has parsed.

    They are large files of JSON, more than half the work of a new client, and each process that is forked makes one.
    """
    from botocore.loaders import JSONFileLoader

    parse = functools.cache(functools.partial(JSONFileLoader.load_file, JSONFileLoader()))
    JSONFileLoader.load_file = lambda self, path: parse(path)


def check_each_kind_once() -> None:
    """Let the short check before the first write pass a place like one that it has passed in this process.

    Before a module takes it from `safety`. Storages that tests make unfit are of classes of their own: checked always.
    """
    check = safety.refuse_unsafe

    def refuse_unsafe(storage: Storage) -> None:
        kind = "disk" if storage.is_local else f"{storage.url.partition(':')[0]} {os.environ.get('AWS_ENDPOINT_URL')}"
        if type(storage) is not Storage or kind not in KNOWN_KINDS:
            check(storage)
        if type(storage) is Storage:
            KNOWN_KINDS.add(kind)

    assert "featurestore.store" not in sys.modules
    safety.refuse_unsafe = refuse_unsafe
