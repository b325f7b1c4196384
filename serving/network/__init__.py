"""The network of a bundle: exported from a trained run, and run on one request or several, in steps.

Long work is a generator that stops between its pieces, so that an event loop can do other work meanwhile.
"""

from collections.abc import Generator
from typing import TypeVar

ResultT = TypeVar("ResultT")

Steps = Generator[None, None, ResultT]
"""Work that yields after each piece, and returns its result at the end."""
CHUNK = 10_000
"""Values that are converted in one piece."""


def run_steps(steps: Steps[ResultT]) -> ResultT:
    """Run all pieces, and return the result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: ResultT = end.value
            return result
