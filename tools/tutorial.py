"""Run the commands of docs/TUTORIAL.md as they are written, and make the pictures of that page from their output.

python -m tools.tutorial              run them in a folder for a while, and write docs/pictures/tutorial-*
python -m tools.tutorial --quick      with few clicks, and write no pictures: does every command still work?

A picture behind a block of commands shows that block: .svg what it printed, .png what it made (PICTURES).
"""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt
from PIL import Image, ImageDraw
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from trainer.launch import free_port

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "TUTORIAL.md"
PLACE = Path("data/tutorial")
QUICK = {"--small": "--items 200 --users 150 --days 4", "random:0": "random:0 --backbone mobilenet_v3_small:avgpool"}
"""Replacements in the commands, for few clicks and features of a small network."""
SERVERS = re.compile(r"python -m (serving data|explorer)")
WIDTH, MOST_LINES = 100, 20
READY_S = 120


@dataclass
class Block:
    """Commands of the page, and the names of the pictures behind them."""

    text: str
    pictures: list[str] = field(default_factory=list)

    @property
    def is_server(self) -> bool:
        """Whether it runs until it is interrupted."""
        return bool(SERVERS.match(self.text))


def blocks_of(page: str) -> list[Block]:
    """Read the blocks of commands of a page, in their order."""
    blocks: list[Block] = []
    for token in MarkdownIt("commonmark").parse(page):
        if token.type == "fence" and not token.info:
            blocks.append(Block(token.content.strip()))
        for child in token.children or []:
            if child.type == "image" and blocks:
                blocks[-1].pictures.append(Path(str(child.attrGet("src"))).name)
    return blocks


def commands_of(text: str) -> list[str]:
    """Cut a block into its commands, a line each; one with a text for a file in it stays whole."""
    return [text] if "<<" in text else text.splitlines()


def run(text: str, folder: Path) -> str:
    """Run a command by bash and return its standard output. Raises CalledProcessError, after all output is shown."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": str(WIDTH - 2)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        print(done.stdout, done.stderr, file=sys.stderr)
        done.check_returncode()
    return re.sub(r"^\[\d+\]<std(out|err)>:", "", done.stdout, flags=re.MULTILINE)


@contextlib.contextmanager
def running(text: str, folder: Path, port: int) -> Iterator[None]:
    """Start a server, wait until it answers, and stop it at the end. Raises RuntimeError."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, *text.split()[1:]]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            path = "/v2/health/ready" if "serving" in text else "/"
            start_s = time.monotonic()
            while not _answers(f"http://127.0.0.1:{port}{path}"):
                if process.poll() is not None or time.monotonic() - start_s > READY_S:
                    log.seek(0)
                    raise RuntimeError(f"{text}: it does not answer\n{log.read().decode()}")
                time.sleep(0.3)
            yield
        finally:
            process.terminate()
            process.wait(30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def as_svg(done: list[tuple[str, str]]) -> str:
    """Draw commands and their output as a terminal; of a long output, the first lines of the last command."""
    shown = done if sum(len(lines_of(printed)) for _, printed in done) <= MOST_LINES else done[-1:]
    console = Console(record=True, width=WIDTH, file=io.StringIO(), legacy_windows=False)
    for command, printed in shown:
        console.print(Text(f"$ {command.splitlines()[-1]}", style="bold green", overflow="fold"))
        lines = lines_of(printed)
        for line in lines[:MOST_LINES]:
            console.print(Text(line, overflow="fold"))
        if len(lines) > MOST_LINES:
            console.print(Text("…"))
    # No font of the network: every reader's own will do, as each text has its length.
    drawing = re.sub(r"@font-face \{\{.*?\}\}\s*|<!--.*?-->", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    drawing = drawing.replace("Fira Code, monospace", "'DejaVu Sans Mono', Menlo, Consolas, monospace")
    return console.export_svg(title="terminal", theme=MONOKAI, code_format=drawing, unique_id="tutorial")


def lines_of(printed: str) -> list[str]:
    """Split the output of a command into lines, without progress and times of this machine."""
    lines = [line.rstrip() for line in printed.splitlines()]
    return [
        line for line in lines if not re.match(r"\w+: [\d,]+ of [\d,]+$|dask-submit: |step \d+/\d+  loss|time  ", line)
    ]


def contact_sheet(folder: Path, columns: int = 12, rows: int = 4, side_px: int = 64) -> Image.Image:
    """Arrange some pictures of each kind in rows."""
    kinds = sorted(path for path in (folder / PLACE / "images").iterdir() if path.is_dir())
    files = [sorted(kind.glob("*.jpg")) for kind in kinds]
    chosen = [each[place] for place in range(max(map(len, files))) for each in files if place < len(each)]
    page = Image.new("RGB", (columns * side_px, rows * side_px), "white")
    for place, file in enumerate(chosen[: columns * rows]):
        page.paste(_thumbnail(file, side_px), (place % columns * side_px, place // columns * side_px))
    return page


def drawn_request(folder: Path, answer: str, side_px: int = 112) -> Image.Image:
    """Show the pictures of the request: what the user clicked, and each ad above its score."""
    request = json.loads((folder / PLACE / "request.json").read_text())
    history, ads = request["user"]["behavior_image"], request["candidates"]["ad_image"]
    scores = json.loads(answer)["scores"]
    page = Image.new("RGB", (side_px * (len(history) + len(ads)) + 48, side_px + 48), "white")
    draw = ImageDraw.Draw(page)
    draw.text((8, 4), "clicked before", fill="#334155", font_size=15)
    draw.text((side_px * len(history) + 48, 4), "ads, and their scores", fill="#334155", font_size=15)
    for place, name in enumerate(history):
        page.paste(_thumbnail(folder / PLACE / "images" / name, side_px), (place * side_px, 26))
    for place, (name, score) in enumerate(zip(ads, scores, strict=True)):
        left = side_px * (len(history) + place) + 48
        page.paste(_thumbnail(folder / PLACE / "images" / name, side_px), (left, 26))
        draw.text((left + 30, side_px + 28), f"{score:.3f}", fill="#0f172a", font_size=16)
    return page


def _thumbnail(file: Path, side_px: int) -> Image.Image:
    page = Image.new("RGB", (side_px, side_px), "white")
    with Image.open(file) as picture:
        page.paste(picture.convert("RGB").resize((side_px - 4, side_px - 4)), (2, 2))
    return page


PICTURES: dict[str, Callable[[Path, str], Image.Image]] = {
    "tutorial-clothes.png": lambda folder, _: contact_sheet(folder),
    "tutorial-curve.png": lambda folder, _: Image.open(folder / PLACE / "runs/both/evaluation/missing_curve.png"),
    "tutorial-request.png": drawn_request,
}
"""The content of a picture, by the folder in which the commands ran and the block's output."""


def make_picture(name: str, done: list[tuple[str, str]], folder: Path, out: Path) -> None:
    """Write one picture of a block, by its commands and their output."""
    if name in PICTURES:
        picture = PICTURES[name](folder, done[-1][1])
        picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(out / name, optimize=True)
    else:
        (out / name).write_text(as_svg(done), encoding="utf-8")


def follow(page: str, folder: Path, out: Path | None) -> None:
    """Run all blocks of a page in `folder`, and write their pictures into `out`. Raises CalledProcessError."""
    blocks = blocks_of(page)
    port = free_port() if any(block.is_server for block in blocks) else 0
    with contextlib.ExitStack() as servers:
        for block in blocks:
            if block.is_server:
                own = port if "8080" in block.text else free_port()
                text = block.text.replace("8080", str(own))
                servers.enter_context(running(text if str(own) in text else f"{text} --port {own}", folder, own))
                continue
            done = []
            for command in commands_of(block.text):
                print(f"$ {command}", flush=True)
                printed = run(command.replace("8080", str(port)), folder)
                done.append((command, printed.replace(f"{folder}/", "")))
            for name in block.pictures if out else []:
                make_picture(name, done, folder, out or folder)


def quick_page() -> str:
    """Return the tutorial with commands that take a minute in all."""
    page = PAGE.read_text(encoding="utf-8")
    for written, quick in QUICK.items():
        assert written in page
        page = page.replace(written, quick)
    return page


def main() -> int:
    """Follow the tutorial and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few clicks, a small network, and no pictures")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", help="folder of the pictures")
    chosen = parser.parse_args()
    page = quick_page() if chosen.quick else PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "jobs").symlink_to(ROOT / "jobs")
        if not chosen.quick:
            chosen.out.mkdir(parents=True, exist_ok=True)
        follow(page, folder, None if chosen.quick else chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
