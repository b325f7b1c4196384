"""What a user does: searches, sends a picture, compares runs, asks for another picture of an ad; a run that trains."""

from featurestore.keys import key_of_uri
from tests.explorer.browser.watching.chromium import NARROW, WIDE, too_wide, violations
from tests.explorer.browser.watching.crawl import settle
from tests.explorer.serving import pages_of
from tests.explorer.world import BROKEN, COPY, HOSTILE, PLAIN
from trainer.loop.summary import EventsFile

DRAWN = "[...document.querySelectorAll('#loss .main-svg')].map(each => getComputedStyle(each).position)"


def test_a_search_finds_by_a_part_of_a_uri_by_uri_and_by_key(explorer, tab):
    page = tab(f"{explorer.url}/", width=NARROW)
    page.get_by_role("navigation").get_by_role("link", name="Images").click()
    page.get_by_label("Key, uri").fill("SHOE-0")
    page.keyboard.press("Enter")
    page.wait_for_url("**/images?q=*")
    page.get_by_role("status").wait_for()
    shown = page.locator("main .gallery").inner_text()
    assert all(name in shown for name in PLAIN if "shoe-0" in name and name != BROKEN)
    assert BROKEN not in shown
    for asked in (COPY, str(key_of_uri(COPY))):
        page.goto(f"{explorer.url}/images")
        page.get_by_label("Key, uri").fill(asked)
        page.keyboard.press("Enter")
        page.wait_for_url("**/images?*q=*")
        page.locator("main .gallery").get_by_role("link", name=COPY).click()
        page.wait_for_url(f"**/images/{key_of_uri(COPY)}*")


def test_a_picture_that_is_sent_is_shown_beside_those_like_it(explorer, world, tab):
    page = tab(f"{explorer.url}/images", width=NARROW, dark=True)
    page.get_by_label("Or a picture of yours").set_input_files(world.images / PLAIN[5])
    page.get_by_role("button", name="Find images like it").click()
    page.get_by_alt_text("The picture that was sent").wait_for()
    for space in page.locator("section.space").all():
        if space.locator(".gallery li").count():
            assert PLAIN[5] in space.locator(".gallery li").first.inner_text()
    assert page.locator("section.space .gallery").count() >= 2
    assert (too_wide(page), violations(page)) == ([], "")


def test_runs_side_by_side_have_a_verdict_with_an_interval(explorer, tab):
    page = tab(f"{explorer.url}/runs", width=WIDE)
    for name in ("ids-only", "both"):
        page.get_by_label(f"Choose {name}", exact=True).check()
    page.get_by_role("button", name="Show the chosen runs").click()
    page.wait_for_url("**/runs/compare?*")
    assert "model.images" in page.locator("main").inner_text()
    page.locator(".verdict").first.wait_for(timeout=120_000)
    settle(page)
    assert " to " in page.get_by_role("region", name="Differences in GAUC").inner_text()
    assert (too_wide(page), violations(page)) == ([], "")


def test_an_ad_gets_another_score_with_another_picture(explorer, tab):
    page = tab(f"{explorer.url}/impressions")
    settle(page)
    page.locator("main a[href^='/impressions/']").first.click()
    settle(page)
    field = page.get_by_label("Another picture")
    field.wait_for(timeout=120_000)
    field.fill(HOSTILE[0])
    page.get_by_role("button", name="Score it").click()
    page.wait_for_url("**picture=*")
    settle(page)
    assert HOSTILE[0] in page.locator("main").inner_text()
    assert page.locator("main").get_by_role("alert").count() == 0


def test_curves_are_drawn_again_until_a_run_ends(changing_world, watch):
    run = changing_world.runs / "both"
    report = (run / "report.json").read_bytes()
    (run / "report.json").unlink()
    file = EventsFile(run / "tensorboard", 12)
    file.add(13, {"train/loss": 0.25})  # a run that has written nothing for ten minutes does not train any more
    with pages_of(runs=changing_world.runs) as url, watch(url) as page:
        page.goto(f"{url}/runs/both")
        for step in (14, 15):
            file.add(step, {"train/loss": 0.25})
            page.wait_for_selector(f"text=“both” is training: step {step}")
            page.wait_for_selector("#loss .main-svg")
            page.wait_for_timeout(300)  # what htmx does when it settles is done
            assert page.evaluate(DRAWN) == ["absolute"] * 3
        (run / "report.json").write_bytes(report)
        page.wait_for_selector("text=is training", state="detached")
        asked = len(page.seen.asked)
        page.wait_for_timeout(6000)
        assert len(page.seen.asked) == asked
        assert page.evaluate(DRAWN) == ["absolute"] * 3
