"""Pages of runs and a model: the list, one, several, what images are worth."""

import re
import shlex
import shutil
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from threading import Event

import pytest
from starlette.testclient import TestClient

from explorer.data.runs.comparing import compare_runs
from explorer.data.runs.folders import read_runs
from explorer.places import Places
from explorer.problems import Problem
from serving.problems import Problem as ServingProblem
from tests.cli import invoke
from tests.explorer.serving import client_of, page, whole
from tests.explorer.world import World
from tests.raised import told
from trainer.loop.summary import EventsFile
from trainer.main import app as main
from trainer.runs.folder import DAYS_FILE

IMAGES_ALONE = re.compile(r"model\.images</th>\s*<td>none</td><td>both</td>")


@pytest.fixture
def changing(changing_world: World) -> Iterator[TestClient]:
    with client_of(changing_world.places()) as client:
        yield client


def text_of(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def test_the_list_has_every_run_with_settings_that_differ(pages: TestClient) -> None:
    html = page(pages, "/runs").replace("<wbr>", "")
    for name in ("both", "both-longer", "ids-only"):
        assert f'href="/runs/{name}"' in html
    assert ">model.images</a></th>" in html and ">train.max_steps</a></th>" in html
    assert html.index(">GAUC</a></th>") < html.index(">model.images</a></th>")  # a telephone shows the first ones alone
    assert 'href="/worth"' in html


def test_the_list_is_sorted_by_any_of_its_columns(pages: TestClient, world: World) -> None:
    listed = page(pages, "/runs")
    columns = [unescape(each) for each in re.findall(r'<a href="(/runs\?sort=[^"]+)">', listed)]
    assert len(columns) > 8 and "/runs?sort=gauc" in columns and "/runs?sort=changed" not in columns
    row = re.compile(r'<th scope="row"><a href="/runs/([^"]+)"')
    names = {address: row.findall(page(pages, address)) for address in columns}
    assert len({tuple(sorted(each)) for each in names.values()}) == 1  # each has every run
    facts = read_runs(world.places(), names["/runs?sort=name"])
    assert [run.name for run in facts] == sorted(run.name for run in facts)
    for metric, sign in {"auc": -1, "logloss": 1}.items():
        known = [run for run in facts if run.metrics.get(metric) is not None]
        best_first = [run.name for run in sorted(known, key=lambda run: sign * (run.metrics[metric] or 0.0))]
        assert names[f"/runs?sort={metric}"][: len(known)] == best_first
    assert 'aria-sort="descending">AUC</th>' in page(pages, "/runs?sort=auc")
    assert re.search(told(Problem.UNKNOWN_SORT, value="nosuch"), unescape(page(pages, "/runs?sort=nosuch", 400)))


def test_one_run_has_curves_stages_evaluation_and_settings(pages: TestClient, world: World) -> None:
    html = page(pages, "/runs/both")
    for each in ('id="loss"', ">Milliseconds of each stage<", 'id="test-gauc"', 'id="reliability"', 'id="slices-1"'):
        assert each in html
    text = text_of(html)
    assert "train.max_steps 12" in text
    assert "step-00000012" in text
    assert "crossmedia evaluate" not in text.partition("Stores and checkpoints")[2]
    assert f"crossmedia evaluate {world.runs / 'both-longer'}" in text_of(page(pages, "/runs/both-longer"))
    assert "hx-get" not in html  # it is finished


def test_runs_side_by_side_with_verdicts(pages: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    address, is_seen = "/runs/compare?run=ids-only&run=both&run=both-longer", Event()
    monkeypatch.setattr("explorer.pages.runs.compare_runs", lambda *args: is_seen.wait(60) and compare_runs(*args))
    html = page(pages, address)
    is_seen.set()
    assert re.findall(r'<div id="(\w+)" hx-get', html) == ["verdicts", "differences"]
    assert text_of(html).index("Settings that differ") < text_of(html).index("GAUC")
    verdicts, differences = whole(pages, address, "wait=").split('<div id="differences">')
    found = re.findall(r"is (?:better|worse) than “ids-only”|No significant difference", text_of(differences))
    assert len(found) == 6  # 2 runs, 3 metrics
    assert len(re.findall(r"in GAUC", text_of(verdicts.partition('<div id="verdicts">')[2]))) == 2
    assert "hx-get" not in page(pages, address)  # it is there now


def test_what_images_are_worth_is_linked_from_the_first_page(pages: TestClient, tmp_path: Path) -> None:
    assert 'href="/worth"' in page(pages, "/")
    html = page(pages, "/worth")
    assert IMAGES_ALONE.search(html)
    assert "both-longer" not in html
    assert html.index('id="verdicts"') < html.index("<h2>")  # what they are worth is told first
    assert "in GAUC" in whole(pages, "/worth", "wait=differences")
    without = client_of(Places(runs=str(tmp_path)))
    assert "There are no runs" in page(without, "/runs")
    assert page(without, "/worth") and page(without, "/")


def test_runs_that_differ_in_more_tell_nothing_of_images(changing: TestClient, changing_world: World) -> None:
    """The page has a command in their place; of a run, it trains what is missing."""
    shutil.rmtree(changing_world.runs / "ids-only")
    assert "/worth" not in page(changing, "/runs")
    (command,) = re.findall(r"<pre[^>]*><code>(.*?)</code></pre>", page(changing, "/worth"), re.S)
    words = shlex.split(unescape(command))
    assert words[:4] == ["crossmedia", "train", "--config", f"{changing_world.runs}/both/config.yaml"]
    invoke(main, *words[2:], f"run.dir={changing_world.runs}", code=0)
    assert IMAGES_ALONE.search(page(changing, "/worth"))


def test_days_of_trainer_daily_are_listed_opened_and_compared(changing: TestClient, changing_world: World) -> None:
    for name in ("both", "ids-only"):
        shutil.copytree(changing_world.runs / name, changing_world.runs / "daily" / name)
    (changing_world.runs / "daily" / DAYS_FILE).write_text("{}")
    listed = page(changing, "/runs")
    assert 'href="/runs/daily/both"' in listed and 'value="daily/both"' in listed
    opened = page(changing, "/runs/daily/both")
    assert "Run daily/both" in text_of(opened) and 'id="loss"' in opened
    address = "/runs/compare?run=both-longer&run=daily%2Fboth"
    assert 'href="/runs/daily/both"' in page(changing, address)
    said = text_of(whole(changing, address, "wait=differences"))
    assert re.search("“daily/both” (and|is better than|is worse than) “both-longer” in GAUC", said)


def test_a_run_that_trains_is_live_until_it_ends(changing: TestClient, changing_world: World) -> None:
    run = changing_world.runs / "both"
    report = (run / "report.json").read_bytes()
    (run / "report.json").unlink()
    html = page(changing, "/runs/both")
    assert 'id="curves" hx-get="/runs/both?wait=curves" hx-trigger="load delay:4s"' in html
    compared = page(changing, "/runs/compare?run=both&run=ids-only")
    assert 'id="curves" hx-get="/runs/compare?run=both&amp;run=ids-only&amp;wait=curves"' in compared
    assert "is training: step 12" in text_of(html)
    file = EventsFile(run / "tensorboard", 12)
    file.add(13, {"train/loss": 0.25})
    assert "is training: step 13, loss 0.2500" in text_of(page(changing, "/runs/both"))
    (run / "report.json").write_bytes(report[:100])
    assert "cannot be read" in page(changing, "/runs/both")
    (run / "report.json").write_bytes(report)
    assert "hx-get" not in page(changing, "/runs/both")


def test_a_published_model_is_shown_until_it_goes_away(world: World, tmp_path: Path) -> None:
    model = shutil.copytree(world.model, tmp_path / "model")
    client = client_of(Places(store=str(world.store), model=str(model)))
    text = page(client, "/model")
    for shown in ("Version 1 is in use", "step-00000012", '<b class="good">in use</b> since'):
        assert shown in text
    assert re.search(r"<td>GAUC 0\.\d{4}; AUC 0\.\d{4}; log loss \d\.\d{4}</td>", text)
    assert "gauc_impressions" not in text
    assert "Model</a>" in page(client, "/")
    shutil.rmtree(model)
    assert ServingProblem.NO_MODEL.of(model) in page(client, "/model", 400)


def test_further_pairs_are_linked(own_runs: tuple[TestClient, Path]) -> None:
    client, runs = own_runs
    copies = [shutil.copytree(runs / name, runs / f"{name}-7") for name in ("both", "ids-only")]
    for copy in copies:
        config = (copy / "config.yaml").read_text()
        (copy / "config.yaml").write_text(config.replace("  seed: 0", "  seed: 7"))
    (link,) = re.findall(r'href="(/runs/compare[^"]*)"', page(client, "/worth"))
    for each in (unescape(link), "/worth"):
        assert IMAGES_ALONE.search(page(client, each))
    for copy in copies:
        shutil.rmtree(copy)
