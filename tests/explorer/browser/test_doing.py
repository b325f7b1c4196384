"""What a person does: searches, sends a picture, compares runs, asks for another picture of an ad."""

import pytest

from featurestore.keys import key_of_uri
from tests.explorer.browser.watching.chromium import NARROW, WIDE, too_wide, violations
from tests.explorer.browser.watching.crawl import settle
from tests.explorer.world import BROKEN, COPY, HOSTILE, PLAIN


@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_a_search_finds_by_a_part_of_a_uri_by_uri_and_by_key(explorer, tab, width):
    page = tab(f"{explorer.url}/", width=width)
    page.get_by_role("navigation").get_by_role("link", name="Images").click()
    page.get_by_label("Key, uri").fill("SHOE-0")
    page.keyboard.press("Enter")
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
        assert COPY in page.locator("main").inner_text()


def test_a_search_without_a_find_says_so(explorer, tab):
    page = tab(f"{explorer.url}/images?q=no-such-shoe")
    assert page.get_by_role("status").inner_text().startswith("0 found")
    assert violations(page) == ""


@pytest.mark.parametrize(("width", "dark"), [(NARROW, True), (WIDE, False)])
def test_a_picture_that_is_sent_is_shown_beside_those_like_it(explorer, world, tab, width, dark):
    page = tab(f"{explorer.url}/images", width=width, dark=dark)
    page.get_by_label("Or a picture of yours").set_input_files(world.images / PLAIN[5])
    page.get_by_role("button", name="Find images like it").click()
    page.get_by_alt_text("The picture that was sent").wait_for()
    for space in page.locator("section.space").all():
        if space.locator(".gallery li").count():
            assert PLAIN[5] in space.locator(".gallery li").first.inner_text()
    assert page.locator("section.space .gallery").count() >= 2
    assert too_wide(page) == []
    assert violations(page) == ""


def test_what_is_sent_and_is_no_picture_is_refused_in_words(explorer, world, tab, tmp_path):
    page = tab(f"{explorer.url}/images")
    page.seen.expected_status.add(400)
    (tmp_path / "<b>no.png").write_text("<script>alert(1)</script>")
    page.get_by_label("Or a picture of yours").set_input_files(tmp_path / "<b>no.png")
    page.get_by_role("button", name="Find images like it").click()
    page.get_by_role("alert").wait_for()
    assert page.locator("main b, main script").count() == 0


@pytest.mark.parametrize(("width", "dark"), [(NARROW, True), (WIDE, False)])
def test_runs_side_by_side_have_a_verdict_with_an_interval(explorer, tab, width, dark):
    page = tab(f"{explorer.url}/runs", width=width, dark=dark)
    for name in ("ids-only", "both"):
        page.get_by_label(f"Choose {name}", exact=True).check()
    page.get_by_role("button", name="Show the chosen runs").click()
    page.wait_for_url("**/runs/compare?*")
    assert "model.images" in page.locator("main").inner_text()
    page.locator(".verdict").first.wait_for(timeout=120_000)
    settle(page)
    assert " to " in page.get_by_role("region", name="Differences in GAUC").inner_text()
    assert too_wide(page) == []
    assert violations(page) == ""


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
