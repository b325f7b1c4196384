"""How a job ends that did not come to its end: one line that says why, and an exit code."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from featurestore.console.commandline import FAILED, STOPPED, USAGE, say_error
from featurestore.errors import FeatureStoreError
from pipeline.errors import BackboneError, InsecureSchedulerError, PipelineError, SampleOptionError, WeightsError


@contextmanager
def told() -> Iterator[None]:
    """Errors of ours end the program with 1, or with 2 where an option was wrong; Ctrl-C ends it with 130."""
    try:
        yield
    except (PipelineError, FeatureStoreError) as error:
        say_error(error)
        raise typer.Exit(exit_code(error)) from error
    except KeyboardInterrupt:
        typer.echo("stopped; what is finished is kept, and the same command goes on from there", err=True)
        raise typer.Exit(STOPPED) from None


def exit_code(error: Exception) -> int:
    """2 for a mistake in the options or a scheduler that is refused, 1 for everything else."""
    mistakes = (BackboneError, WeightsError, SampleOptionError, InsecureSchedulerError)
    return USAGE if isinstance(error, mistakes) else FAILED


def power_of_two(value: int | None) -> int | None:
    """A number of shards, as an option has it. Raises typer.BadParameter."""
    if value is not None and value & (value - 1):
        raise typer.BadParameter(f"{value} is not a power of two; try 64 or 128")
    return value
