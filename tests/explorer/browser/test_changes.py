"""A store that others change while people look: pages show the newest state, and none fails in between."""

import threading

import numpy as np

from featurestore import FeatureRows, FeatureStore
from featurestore.keys import key_of_uri
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import expire
from tests.explorer.browser.watching.crawl import settle
from tests.explorer.serving import pages_of
from tests.explorer.world import HISTORY, PLAIN, draw

NEW = "new/<i>while you look</i>.png"
ROUNDS = 12
PAGES = (
    "/store",
    "/store/snapshots/5",
    "/store/arrived",
    "/store/duplicates",
    "/images",
)


def add(world, name):
    """Put a picture into the folder and the store, as a refresh would."""
    draw(world.images, name, 77)
    store = FeatureStore.open(world.store)
    return store.put(FeatureRows.of([name], np.ones((1, store.info.dim), np.float32)), "refresh").version


def test_a_reload_shows_a_commit_that_came_meanwhile(changing_world, watch):
    world = changing_world
    with pages_of(store=world.store, images=world.images) as address, watch(address) as page:
        page.goto(f"{address}/store")
        settle(page)
        assert "while you look" not in page.content()
        version = add(world, NEW)
        assert version == max(HISTORY) + 1
        page.reload()
        settle(page)
        page.locator(f"main a[href='/store/snapshots/{version}']").first.click()
        settle(page)
        assert NEW in page.locator("main .gallery").inner_text()
        page.locator("main .gallery a").first.click()
        settle(page)
        assert page.url.endswith(f"/images/{key_of_uri(NEW)}")


def test_pages_of_a_picture_whose_snapshots_have_expired(changing_world, watch):
    """The page is open; its snapshot and its files go; what is clicked then is a page, which may say that they went."""
    world = changing_world
    with pages_of(store=world.store, images=world.images) as address, watch(address) as page:
        page.goto(f"{address}/store/snapshots/2")
        settle(page)
        links = page.evaluate("[...document.querySelectorAll('main a[href]')].map(link => link.href)")
        store = FeatureStore.open(world.store)
        store.delete([key_of_uri(PLAIN[0])])
        compact(store, force=True)
        expire(store, keep_last=1, keep_days=0, grace_days=0)
        assert len(store.snapshot().manifest.shards) > 0
        page.seen.expected_status.update((400, 404))
        for link in dict.fromkeys(links):
            answer = page.goto(link)
            settle(page)
            assert answer is None or answer.status < 500, link
            assert page.locator("main").inner_text().strip() != ""


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
