"""Run the commands of docs/TUTORIAL.md as they are written, in a temporary folder, and print what they print.

python -m tools.tutorial              ten minutes
python -m tools.tutorial --quick      a minute, with few clicks: does every command still work?
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from markdown_it import MarkdownIt

from crossmedia.demo_serving import running
from trainer.launch import free_port

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "TUTORIAL.md"
QUICK = {"--small": "--items 200 --users 150 --days 4", "random:0": "random:0 --backbone mobilenet_v3_small:avgpool"}
"""Replacements in the commands, for few clicks and features of a small network."""
SERVERS = re.compile("crossmedia (serve|explore) ")


def blocks_of(page: str) -> list[str]:
    """Read the blocks of commands of a page, in their order: those of code without a language."""
    return [
        token.content.strip()
        for token in MarkdownIt("commonmark").parse(page)
        if token.type == "fence" and not token.info
    ]


def commands_of(text: str) -> list[str]:
    """Cut a block into its commands, a line each; one with a text for a file in it stays whole."""
    return [text] if "<<" in text else text.splitlines()


def environment() -> dict[str, str]:
    """Make the environment of a command: this checkout, and this environment's programs."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}


def run(text: str, folder: Path) -> None:
    """Run a command by bash. Raises CalledProcessError."""
    subprocess.run(["bash", "-euc", text], cwd=folder, env=environment(), check=True)


def follow(page: str, folder: Path) -> None:
    """Run all blocks of a page in `folder`; servers run until the last of them. Raises CalledProcessError."""
    blocks = blocks_of(page)
    port = free_port() if any(map(SERVERS.match, blocks)) else 0
    with contextlib.ExitStack() as servers:
        for block in blocks:
            text = block.replace("8080", str(port))
            if SERVERS.match(text):
                own = port if str(port) in text else free_port()
                ready = "/v2/health/ready" if " serve " in text else "/"
                port_option = [] if own == port else ["--port", str(own)]
                servers.enter_context(running(["-m", *text.split(), *port_option], own, ready, folder, environment()))
                continue
            for command in commands_of(text):
                print(f"$ {command}", flush=True)
                run(command, folder)


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
    parser.add_argument("--quick", action="store_true", help="few clicks and a small network")
    page = quick_page() if parser.parse_args().quick else PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        follow(page, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
