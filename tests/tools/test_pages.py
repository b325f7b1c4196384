"""What the README and the pages in docs/ name is there: files, sections, commands with their options, and settings."""

import ast
import configparser
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import griffe
import pytest
from torch.distributed.run import get_args_parser

import crossmedia
import featurestore
from crossmedia.command import ENTRIES, PROGRAM, load
from featurestore.console.commandline import CommandGroup
from tools import api
from tools import commands as commands_page
from tools.site import WRITTEN, targets_of
from tools.site import text_of as made_text
from trainer.config import BaseNet, IdOptimizer, Pooling, load_config

ROOT = Path(__file__).parents[2]
NAMES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
TRANSLATED = {"ValueError", "CsvTextError"}  # which become others before a user meets them
MOST_FILES_OF_A_STEP, MOST_LINES_OF_A_STEP = 10, 1_800
LETTERS = {"keys_U", "feature_QD", "timeout_s"}  # examples of names of arrays
FOLDERS = "crossmedia|featurestore|pipeline|trainer|serving|explorer|jobs|benchmarks|deploy|tools|tests|docs"


@cache
def text_of(page: str) -> str:
    return made_text(ROOT, page)


def anchors(page: Path) -> set[str]:
    """The names by which links reach the sections of a page."""
    titles = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Every command line in a block of code of a page, as words; the examples in the help of each command too."""
    for page in (*NAMES, "docs/COMMANDS.md"):
        blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text_of(page), re.MULTILINE | re.DOTALL)
        for block in (text for language, text in blocks if not language):
            for line in map(str.strip, block.replace("\\\n", " ").splitlines()):
                if re.match(r"(crossmedia|python|dask-submit|horovodrun|torchrun) ", line):
                    yield f"{Path(page).name}: {line}", shlex.split(line, comments=True)


@cache
def commands() -> dict[str, Any]:
    """The command of each file of a job, and of each module that `python -m` runs, and the one command of all."""
    front = CommandGroup(commands={name: load(name) for name in ENTRIES})
    return {PROGRAM: front} | {
        name.split()[-1]: command
        for part in commands_page.PARTS
        for name, command in commands_page.commands_of(part).items()
        if name != "dask-submit"  # a command follows it
    }


LINES = dict(command_lines())


@pytest.mark.parametrize("name", NAMES)
def test_files_that_a_page_names_are_there(name: str) -> None:
    text = (ROOT / name).read_text()
    named = set(re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w/.-]*\w/?)(?=[`),:; \n]|\.\s)", text))
    missing = [each for each in named if not (ROOT / each).exists() and not (ROOT / each.rstrip("/")).is_dir()]
    assert not missing


@pytest.mark.long
@pytest.mark.parametrize("name", [*NAMES, "CHANGELOG.md", "docs/COMMANDS.md", "docs/API.md", "docs/ERRORS.md"])
def test_links_lead_to_a_page_and_a_section(name: str) -> None:
    page, text = ROOT / name, text_of(name)
    assert not re.search(r"<(script|iframe)\b", text), "the site needs no network"
    for target in targets_of(text) | set(re.findall(r'(?:src|href)="([^"]+)"', text)):
        if not target.startswith("https://"):
            file, _, section = target.partition("#")
            other = (page.parent / file if file else page).resolve()
            assert other.is_relative_to(ROOT), target
            assert other.is_file() or f"docs/{file}" in WRITTEN, target
            assert not section or section in anchors(other), target


def test_the_page_of_the_code_has_the_layers_as_they_are() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    contracts = [section for section in settings.values() if "containers" in section]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "docs" / "CODE.md").read_text(), re.MULTILINE))
    assert len(contracts) == 5
    for contract in contracts:
        layers = ", ".join(line for line in contract["layers"].split("\n") if line)
        assert rows[contract["containers"]].replace("\\", "").replace("`", "") == layers


def test_the_walks_name_what_is_there_and_one_training_step_is_read_in_ten_files() -> None:
    walk = (ROOT / "docs" / "CODE.md").read_text().partition("## Walk 1:")[2].partition("## Walk 2:")[0]
    told = {name: int(lines) for name, lines in re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", walk, re.MULTILINE)}
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in told}
    assert 5 < len(told) <= MOST_FILES_OF_A_STEP
    assert sum(lines.values()) <= MOST_LINES_OF_A_STEP
    assert told == {name: pytest.approx(count, abs=10) for name, count in lines.items()}
    text = (ROOT / "docs" / "CODE.md").read_text()
    named = re.findall(r"`((?:_?[A-Z]\w*|[a-z]+_\w+|[A-Z]\w*\.\w+))`", text)
    files = [path for part in FOLDERS.split("|") for path in (ROOT / part).rglob("*.py")]
    code = "\n".join(path.read_text() for path in files)
    known = set(re.findall(r"^ *(?:class|def) (\w+)|^(\w+)(?:: .+)? = ", code, re.MULTILINE))
    known_names = {name for pair in known for name in pair} | {path.stem for path in files} | LETTERS
    assert len(named) > 20
    assert not [name for name in named if not known_names.issuperset(name.split("."))]


def test_pages_stay_short_and_the_readme_links_all() -> None:
    for name, most_lines in (("README.md", 150), ("docs/CODE.md", 230)):
        assert len((ROOT / name).read_text().splitlines()) <= most_lines, name
    links = set(re.findall(r"\]\((docs/\w+\.md)\)", (ROOT / "README.md").read_text()))
    assert links == {name for name in NAMES if name.startswith("docs/")}


@pytest.mark.parametrize("line", LINES)
def test_commands_have_the_options_and_settings_that_pages_show(line: str) -> None:
    check_words(line, LINES[line])


def check_words(line: str, words: list[str]) -> None:
    """Check the words of a command, and those after -- as the words of another one."""
    if words[0] == "torchrun":
        get_args_parser().parse_args(words[1:])  # exits where it does not understand its own options
        words = [word for word in words if word != "--"]
    if "--" in words:
        check_words(line, words[words.index("--") + 1 :])
        words = words[: words.index("--")]
    known = commands()
    start = next((place for place, word in enumerate(words) if word in known), None)
    if start is None:  # tools, and what other projects install
        assert (ROOT / words[1]).is_file(), line
        return
    command, rest = known[words[start]], words[start + 1 :]
    if words[start] == "explorer" and rest[0] not in command.commands:  # `serve` is left out
        rest = ["serve", *rest]
    while rest and rest[0] in getattr(command, "commands", {}):
        command, rest = command.commands[rest[0]], rest[1:]
        if rest and rest[0].startswith("--") and "serve" in getattr(command, "commands", {}):  # `serve` is left out
            command = command.commands["serve"]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in rest if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in options]
    assert not unknown
    if settings := [rest[place + 1] for place, word in enumerate(rest) if word == "--set"]:
        load_config(None, settings)


def test_every_job_and_command_is_on_the_page_of_commands_with_its_help() -> None:
    sections = re.findall(r"^###+ `(.*)`\n\n(.*)", text_of("docs/COMMANDS.md"), re.MULTILINE)
    titles = {title for title, _ in sections}
    assert titles >= {f"{PROGRAM} {name}" for name in ENTRIES} | set(commands_page.commands_of("benchmarks"))
    alone = set(re.findall(r"^The same: `(.*)`\.$", text_of("docs/COMMANDS.md"), re.MULTILINE))
    named = {each.split()[-1] for line in alone for each in line.split("`, `")}
    assert named | {title.split()[-1] for title in titles} >= commands().keys() - {PROGRAM}
    assert not [title for title, about in sections if not re.match(r"[A-Z].*", about)]
    assert {path.name for path in (ROOT / "jobs").glob("[a-z]*.py")} <= {Path(name).name for name in commands()}


def texts_of(source: ast.AST) -> Iterator[str]:
    """The texts in a file of code, or a part of it, with an ellipsis for each value that is put in."""
    for node in ast.walk(source):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def errors_with_texts(source: ast.AST) -> Iterator[tuple[str, str]]:
    """The errors that a file of code makes: their classes, and their texts as `texts_of` has them, or sentences.

    A value that is written there is put into its sentence.
    """
    imports = [each for each in ast.walk(source) if isinstance(each, ast.ImportFrom) and each.module]
    problems = {
        alias.asname or alias.name: import_module(str(each.module)).Problem
        for each in imports
        if str(each.module).endswith(".problems")
        for alias in each.names
    }
    for node in ast.walk(source):
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func).rpartition(".")[2]).endswith("Error"):
            for argument in node.args:
                yield from ((name, text) for text in texts_of(argument))
                if isinstance(argument, ast.Attribute) and (known := problems.get(ast.unparse(argument.value))):
                    text = str(known[argument.attr])
                    for value, given in zip(known[argument.attr].names, node.args[1:], strict=False):
                        if isinstance(given, ast.Constant):
                            text = text.replace(f"{{{value}}}", str(given.value))
                    yield name, text


@pytest.mark.long
def test_messages_of_the_page_of_errors_are_those_of_the_code() -> None:
    """Each is found in one text of the sources, its parts in their order; and its class is that of an error with it."""
    rows = re.findall(r"^\| (\".*?) \| (.*?) \| .+ \|$", (ROOT / "docs" / "TROUBLE.md").read_text(), re.MULTILINE)
    quoted = [(each, column) for row, column in rows for each in re.findall('"([^"]+)"', row)]
    parts = ("featurestore", "trainer", "pipeline", "serving", "explorer", "jobs", "crossmedia")
    sources = [path.read_text() for part in parts for path in (ROOT / part).rglob("*.py")]
    trees, code = list(map(ast.parse, sources)), "\n".join(sources)
    texts = list(dict.fromkeys(text for tree in trees for text in texts_of(tree)))
    raised = [each for tree in trees for each in errors_with_texts(tree)]
    assert len(quoted) > 50
    for each, column in quoted:
        classes = set(re.findall(r"`(\w+Error)`", column))
        assert not [name for name in classes if f"class {name}(" not in code]
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in each.split("…") if part.strip()), re.DOTALL)
        assert any(pattern.search(text) for text in texts), each
        found = {name for name, text in raised if pattern.search(text)} - TRANSLATED
        assert not (classes and found) or classes & found, f"{each}: {column}, in the code {found}"


def test_the_page_of_exactness_names_tests_that_are_there_and_says_which_make_test_leaves_out() -> None:
    """By the marks of functions and modules. Where one value of a parameter has the mark, a row may say so."""
    num_named = 0
    for row in (ROOT / "docs" / "WHY.md").read_text().splitlines():
        for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row):
            num_named += 1
            source = (ROOT / file).read_text()
            marks = re.findall(r"^pytestmark = (.*)", source, re.MULTILINE)
            functions = [each for each in ast.walk(ast.parse(source)) if isinstance(each, ast.FunctionDef)]
            (found,) = [each for each in functions if each.name == name]
            marks += map(ast.unparse, found.decorator_list)
            for target in ("slow", "cluster"):
                those = [mark for mark in marks if f"mark.{target}" in mark]
                is_all, is_said = any("parametrize" not in mark for mark in those), f"`make test-{target}`" in row
                assert is_said if is_all else those or not is_said, row
    assert num_named > 20


SOURCE = '''
class Shelf:
    """Holds things.

    In any order."""

    width: int
    """In cm."""
    _hidden = 1

    def put(self, count: int, /, *things: str, at: str = "top", **more: float) -> None:
        """Put things on it."""

    def silent(self) -> None: ...

    def _own(self) -> None:
        """Not for others."""


def connect(address: str) -> Shelf:
    """Find one."""
'''


def test_signatures_and_docstrings_are_those_of_the_source_and_what_is_private_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "shelves.py").write_text(SOURCE)
    module = griffe.GriffeLoader(search_paths=[tmp_path], allow_inspection=False).load("shelves")
    text = "\n".join(line for name in ("Shelf", "connect") for line in api.section(f"shelves.{name}", module[name]))
    assert "Shelf.put(count: int, /, *things: str, at: str = 'top', **more: float) -> None" in text
    assert "connect(address: str) -> Shelf" in text
    assert "Holds things.\n\nIn any order." in text and "| `width` | In cm. |" in text
    assert "from shelves import connect" in text
    assert "_hidden" not in text and "_own" not in text and "silent" not in text


def test_every_public_name_of_the_store_is_on_the_page() -> None:
    named = {name for names in api.NAMES.values() for name in names}
    for package in (crossmedia, featurestore):
        assert {f"{package.__name__}.{name}" for name in package.__all__} <= named
    titles = re.findall(r"^### `(\w+)`", text_of("docs/API.md"), re.MULTILINE)
    assert titles == [name.rpartition(".")[2] for names in api.NAMES.values() for name in names]


@pytest.mark.parametrize("choice", [*get_args(Pooling), *get_args(BaseNet), *get_args(IdOptimizer)])
def test_each_choice_of_a_model_has_its_words(choice: str) -> None:
    assert any(f"`{choice}`" in (ROOT / "docs" / name).read_text() for name in ("TRAIN.md", "CHOICES.md"))
