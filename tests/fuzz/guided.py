"""Fuzz one parser, guided by coverage: atheris keeps inputs that reach new branches, and changes them further.

    python -m tests.fuzz.guided PARSER FOLDER [options of libFuzzer]

The folder keeps the inputs; it begins with the parser's valid ones. Exit 77 where an input breaks the rule.
"""

import contextlib
import dataclasses
import random
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["featurestore", "pipeline", "serving", "trainer"]):
    from tests.fuzz.parsers import Parser, named

from tests.fuzz.mutate import mutated
from tests.fuzz.run import check


def guided(parser: Parser, folder: Path, options: list[str]) -> None:
    """Run libFuzzer on a parser; it ends the process."""
    for number, data in enumerate(parser.valid()):
        (folder / f"valid-{number}").write_bytes(data)
    by_bytes = dataclasses.replace(parser.form, load=None)

    def change(data: bytes, most_bytes: int, seed: int) -> bytes:
        draw = random.Random(seed)
        with contextlib.suppress(Exception):  # an input whose values nobody can read
            return mutated(draw, [data], parser.form)[:most_bytes]
        return mutated(draw, [data], by_bytes)[:most_bytes]

    def run(data: bytes) -> None:
        check(parser, data)

    atheris.Setup([sys.argv[0], str(folder), *options], run, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    guided(named(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
