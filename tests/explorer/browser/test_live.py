"""What comes later, in the browser: curves of a run that trains, whole each time; neighbours, once computed."""

import threading

from explorer.data.images import visual
from featurestore.keys import key_of_uri
from tests.explorer.browser.watching.chromium import NARROW, too_wide, violations
from tests.explorer.serving import pages_of
from tests.explorer.world import COPIED
from trainer.loop.summary import EventsFile

DRAWN = "[...document.querySelectorAll('#loss .main-svg')].map(each => getComputedStyle(each).position)"


def test_curves_are_drawn_anew_until_the_end(changing_world, watch):
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


def test_neighbours_come_when_a_runs_vectors_are_computed(world, watch, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    real, go = visual.visual_vectors, threading.Event()

    def slow(run, *, progress, **places):
        progress(3, 28)
        assert go.wait(60)
        return real(run, progress=progress, **places)

    monkeypatch.setattr(visual, "visual_vectors", slow)
    places = {"store": world.store, "runs": world.runs, "images": world.images}
    with pages_of(**places) as url, watch(url, width=NARROW) as page:
        page.goto(f"{url}/images/{key_of_uri(COPIED)}?run=both")
        page.wait_for_selector("text=computes the visual vectors of both (3 of 28)")
        assert page.locator("section.space .gallery").count() == 1
        assert violations(page) == ""
        assert too_wide(page) == []
        go.set()
        page.wait_for_selector("text=numbers that the run both")
        assert page.locator("section.space .gallery").count() == 2
        asked = len(page.seen.asked)
        page.wait_for_timeout(3000)
        assert len(page.seen.asked) == asked
