"""Pictures of the explorer's pages for README and docs, made from the demo by Chromium, as `make screenshots` does.

python -m tools.browser.screenshots --dir data/demo --out docs/pictures
"""

import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, NamedTuple

import typer

from featurestore.console.commandline import CommandApp, run_app
from featurestore.errors import UserError
from tools.browser.chromium import WAY_OUT, find_chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDTH, HEIGHT = 1200, 900
MOST_BYTES = 150_000
COLOURS = (256, 128, 64, 32, 16)
"""Of the palette: the most with which the file is small enough."""
TIMEOUT_MS = 180_000
_OPEN = re.compile(r"open (http://\S+)")


class Shot(NamedTuple):
    """A picture: its name, the page, and the element to wait for."""

    name: str
    path: str
    shown: str
    link: str | None = None
    """The page is the one that the first such link on `path` leads to."""
    more: str = ""
    """Behind the link's address."""
    height: int = HEIGHT


SHOTS = (
    Shot("store", "/store", ".plot svg"),
    Shot("image", "/images", "#spaces img", "main a[href^='/images/']", more="?run=both", height=1200),
    Shot("run", "/runs/both", ".plot svg"),
    Shot("compare", "/runs/compare?run=none&run=both", ".verdict"),
    Shot("impression", "/impressions", "h2:has-text('Why this ad')", "main a[href^='/impressions/']", height=1200),
)
_SHORTER = """place => {
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const wanted = place + '/', absolute = RegExp('/[^\\\\s]*?/(?=' + RegExp.escape(wanted) + ')', 'g');
    while (walker.nextNode())
        walker.currentNode.textContent = walker.currentNode.textContent.replace(absolute, '');
}"""
"""Removes the part of each path before the demo's folder, as it belongs to this machine."""

app = CommandApp()


@app.command()
def main(
    place: Annotated[Path, typer.Option("--dir", help="Of the demo.")] = Path("data/demo"),
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("docs/pictures"),
    only: Annotated[list[str] | None, typer.Option(help="Name of a picture; may be repeated. Default: all.")] = None,
) -> None:
    """Take pictures of the explorer's pages, 1,200 pixels wide and at most 150 kB each."""
    chosen = [shot for shot in SHOTS if not only or shot.name in only]
    program = find_chromium()
    if program is None:
        raise UserError(f"no Chromium: {WAY_OUT}")
    if not (place / "models/ctr").is_dir():
        raise UserError(f"{place} holds no finished demo: make it with crossmedia demo --dir {place}")
    out.mkdir(parents=True, exist_ok=True)
    from playwright.sync_api import sync_playwright

    with running(place) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        for name, data in taken(browser, address, chosen, str(place)):
            (out / f"{name}.png").write_bytes(data)
            typer.echo(f"{out / name}.png: {len(data):,} bytes")
        browser.close()


def taken(browser: "Browser", address: str, shots: Sequence[Shot], place: str) -> Iterator[tuple[str, bytes]]:
    """Take each picture of the explorer at an address; yield its name and PNG. Paths below `place` are shortened."""
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
    page.set_default_timeout(TIMEOUT_MS)
    for shot in shots:
        yield shot.name, small(_picture(page, address, shot, place))
    page.close()


@contextmanager
def running(place: Path) -> Iterator[str]:
    """Run the explorer of a demo, and yield its address. Raises UserError if it does not start."""
    folders = {"store": "features", "runs": "runs", "samples": "samples", "images": "images", "model": "models/ctr"}
    options = [word for name, folder in folders.items() for word in (f"--{name}", str(place / folder))]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, "-m", "explorer", *options, "--port", "0"], stderr=log)
        try:
            while not (found := _OPEN.search(_text(log))):
                try:
                    process.wait(0.1)
                except subprocess.TimeoutExpired:
                    continue
                raise UserError(f"the explorer ended: {_text(log).strip()}")
            yield found[1].rstrip("/")
        finally:
            process.terminate()
            process.wait()


def small(png: bytes) -> bytes:
    """Write a PNG with a palette of as many colours as fit into MOST_BYTES, or with the fewest if none fits."""
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGB")
    for colours in COLOURS:
        buffer = io.BytesIO()
        image.quantize(colours, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
        if buffer.tell() <= MOST_BYTES:
            break
    return buffer.getvalue()


def _picture(page: "Page", address: str, shot: Shot, place: str) -> bytes:
    page.set_viewport_size({"width": WIDTH, "height": shot.height})
    page.goto(address + shot.path)
    if shot.link is not None:
        page.goto(f"{address}{page.locator(shot.link).first.get_attribute('href')}{shot.more}")
    page.locator(shot.shown).first.wait_for()
    page.wait_for_load_state("networkidle")
    page.evaluate("Promise.all([...document.images].map(image => image.decode().catch(() => 0)))")
    page.evaluate(_SHORTER, place)
    return page.screenshot()


def _text(log: IO[str]) -> str:
    log.seek(0)
    return log.read()


if __name__ == "__main__":
    run_app(app)
