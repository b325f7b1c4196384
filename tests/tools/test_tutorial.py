"""The tutorial: whoever follows it gets a scored request, and its pictures are those of its own commands."""

import re
from pathlib import Path

import pytest
from PIL import Image

from tools import tutorial

PICTURES = tutorial.ROOT / "docs" / "pictures"
PAGE = tutorial.PAGE.read_text()


@pytest.mark.pages
@pytest.mark.services
@pytest.mark.timeout(900)
def test_every_command_works(tmp_path: Path) -> None:
    """With few clicks, whose scores nobody needs."""
    (tmp_path / "jobs").symlink_to(tutorial.ROOT / "jobs")
    tutorial.follow(tutorial.quick_page(), tmp_path, tmp_path)
    made = {path.name for path in tmp_path.glob("tutorial-*")}
    assert made == {
        name for block in tutorial.blocks_of(PAGE) for name in block.pictures if name.startswith("tutorial")
    }
    score = (tmp_path / "tutorial-score.svg").read_text()
    assert "scores" in score and "http" not in re.sub(r'xmlns="[^"]*"', "", score)
    assert (tmp_path / "data" / "tutorial" / "models" / "ctr").is_dir()


def test_a_command_that_fails_ends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(tutorial.subprocess.CalledProcessError):
        tutorial.follow("```\necho before\nfalse\necho after\n```\n", tmp_path, None)
    assert "echo after" not in capsys.readouterr().out


def test_blocks_are_read_with_their_pictures() -> None:
    pictures = "![x](pictures/one.png)\n\ntext\n\n![y](pictures/two.svg)"
    page = f"```\na\nb\n```\n\n{pictures}\n\n```json\n{{}}\n```\n\n```\nc\n```\n"
    assert tutorial.blocks_of(page) == [tutorial.Block("a\nb", ["one.png", "two.svg"]), tutorial.Block("c")]


def test_a_terminal_shows_the_last_command_where_all_are_too_long() -> None:
    def words(svg: str) -> str:
        return " ".join(re.findall(r">([^<>]+)</text>", svg)).replace("&#160;", " ")

    both = words(tutorial.as_svg([("first", "1\n2\n"), ("second", "3\n")]))
    assert "$ first" in both and "$ second" in both
    last = words(
        tutorial.as_svg([("first", "1\n" * 30), ("second", "\n".join(f"line {number}" for number in range(30)))])
    )
    assert "$ first" not in last and "line 19" in last and "line 20" not in last and "…" in last


def test_pictures_are_small_and_need_nothing_of_the_network() -> None:
    names = re.findall(r"\]\(pictures/([\w.-]+)\)", PAGE)
    assert len([name for name in names if name.startswith("tutorial-")]) >= 9
    for name in names:
        path = PICTURES / name
        assert path.stat().st_size <= 150_000, name
        if path.suffix == ".svg":
            assert not re.search(r"url\((?!#)|href=", path.read_text()), name
        else:
            with Image.open(path) as picture:
                assert picture.width >= 300
