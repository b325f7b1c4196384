"""Hostile text, as a name of an image or a run, or in the data of a chart, is text on every page that shows it."""

import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from explorer.html.site import script_json
from featurestore import key_of_uri
from tests.explorer.serving import page
from tests.explorer.world import HOSTILE, SCRIPT

RUNS = [
    "<script>alert(1)<", "a b?c=d&e#f", "'onclick='alert(1)", "\u202egnp", "{{ 7*7 }}", "$(touch x);`y`", "compare",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_found_by_itself_and_shown_as_text(reader, name):
    found = reader.read("/images", q=name.strip())
    assert name in found.uris()
    assert "\u202e" not in found.text
    found = reader.read(f"/images/{key_of_uri(name)}")
    assert not {"b", "i"} & {*found.elements}
    assert found.elements.count("script") == 1
    assert name in found.uris()[0]
    assert "x-picture-problem" not in reader.client.get(found.pictures[0]).headers
    assert "\u202e" not in found.text


@pytest.mark.parametrize("name", RUNS)
def test_hostile_names_are_only_text(own_runs: tuple[TestClient, Path], name: str) -> None:
    client, runs = own_runs
    shutil.copytree(runs / "both-longer", runs / name)
    html = page(client, "/runs")
    link = next(each for each in re.findall(r'href="(/runs/[^"]*)"', html) if "both" not in each and "ids" not in each)
    one = page(client, unescape(link))
    compared = client.get("/runs/compare", params={"run": ["both", name]}).text
    shutil.rmtree(runs / name)
    for each in (html, one, compared):
        each = re.sub(r'<script type="application/json".*?</script>', "", each)  # noqa: PLW2901 - data, never markup
        assert "<script>alert" not in each
        assert "'onclick='alert" not in each
    assert "crossmedia evaluate" in one
    if "`" in name:
        assert "&#39;" in one.partition("crossmedia evaluate")[2].partition("</code>")[0]  # quoted


def test_json_in_a_script_cannot_end_it_and_is_the_same_json() -> None:
    text = str(script_json({"name": SCRIPT}))
    assert "<" not in text and ">" not in text and "&" not in text and "\u2028" not in text
    assert json.loads(text) == {"name": SCRIPT}
