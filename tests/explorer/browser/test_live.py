"""A run that trains, in the browser: its curves are drawn again and again, whole each time, until it ends."""

from tests.explorer.serving import pages_of
from trainer.loop.events import EventsFile

DRAWN = "[...document.querySelectorAll('#loss .main-svg')].map(each => getComputedStyle(each).position)"


def test_curves_are_drawn_anew_until_the_end(changing_world, watch):
    run = changing_world.runs / "both"
    report = (run / "report.json").read_bytes()
    (run / "report.json").unlink()
    file = EventsFile(run / "tensorboard", 12)
    file._path = file._path.with_name("events.out.tfevents.9999999999.x")
    with pages_of(runs=changing_world.runs) as url, watch(url) as page:
        page.goto(f"{url}/runs/both")
        for step in (13, 14):
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
