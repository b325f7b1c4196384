"""Bugs that are planted in parsers, one at a time, to see that inputs find them: a guard or a bound is dropped.

planted.toml has them; each is a text of one function and the text that takes its place (tests/planted.py).
"""

import tomllib
from pathlib import Path

from tests.planted import Bug

DROPPED: dict[str, list[tuple[str, str]]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
"""Of each parser the functions, and what of their text is dropped."""


def _instead(text: str) -> str:
    """Return what takes the place of a text: nothing for a part of a list, no error, or a condition that is false."""
    if text.startswith((", ", " or ")) or text.endswith((", ", " or ", " and ")):
        return ""
    return "ZeroDivisionError" if text.endswith(("Error", "Exception", "Error)")) else "False"


BUGS = [Bug(text, kind, place, text, _instead(text)) for kind, dropped in DROPPED.items() for place, text in dropped]
NESTED = "self.flow_level >= _MOST_NESTED"
DEPTH = ("featurestore.parsing:_Loader.compose_node", "self._depth > _MOST_NESTED", "False")
"""Lists inside each other are counted at both places: alone, either is enough."""
BUGS.append(
    Bug(NESTED, "mapping", "featurestore.parsing:_Loader.fetch_flow_collection_start", NESTED, "False", (DEPTH,))
)
