"""A store that others change while people look: no page fails in between."""

import threading

import numpy as np

from featurestore import FeatureRows, FeatureStore
from featurestore.keys import key_of_uri
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import expire
from tests.explorer.browser.watching.crawl import settle
from tests.explorer.serving import pages_of
from tests.explorer.world import draw

ROUNDS = 12
PAGES = (
    "/store",
    "/store/snapshots/5",
    "/store/arrived",
    "/images",
)


def add(world, name):
    """Put a picture into the folder and the store, as a refresh would."""
    draw(world.images, name, 77)
    store = FeatureStore.open(world.store)
    return store.put(FeatureRows.of([name], np.ones((1, store.info.dim), np.float32)), "refresh").version


def test_no_page_fails_while_a_writer_commits_compacts_and_expires(changing_world, watch):
    world, ended, failures = changing_world, threading.Event(), []

    def write() -> None:
        store, number = FeatureStore.open(world.store), 0
        while not ended.wait(0.05):
            try:
                number += 1
                add(world, f"new/{number}.png")
                store.delete([key_of_uri(f"new/{number - 3}.png")])
                if number % 3 == 0:
                    compact(store, force=True)
                    expire(store, keep_last=2, keep_days=0, grace_days=5 / 86_400)
            except Exception as error:
                failures.append(error)
                return

    writer = threading.Thread(target=write)
    with pages_of(store=world.store, images=world.images) as address, watch(address) as page:
        page.seen.expected_status.update((400, 404))  # of a snapshot that has expired
        writer.start()
        try:
            for number in range(ROUNDS):
                page.goto(address + PAGES[number % len(PAGES)])
                settle(page)
        finally:
            ended.set()
            writer.join()
    assert failures == []
