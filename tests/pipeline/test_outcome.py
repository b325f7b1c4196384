"""How jobs end: exit codes, and what is said."""

import pytest
import typer

from featurestore.errors import StorageError
from pipeline.errors import ExtractionError, WeightsError
from pipeline.outcome import power_of_two, told


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (StorageError("the disk is full"), 1, "error: the disk is full"),
        (ExtractionError("no images"), 1, "error: no images"),
        (WeightsError("no such file"), 2, "error: no such file"),
        (KeyboardInterrupt(), 130, "the same command goes on"),
    ],
)
def test_an_error_is_one_line_and_a_code(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as end, told():
        raise error
    said = capsys.readouterr().err
    assert end.value.exit_code == code
    assert words in said and said.count("\n") == 1


def test_what_is_not_ours_is_left_alone() -> None:
    with pytest.raises(ZeroDivisionError), told():
        raise ZeroDivisionError


def test_shards_are_a_power_of_two() -> None:
    assert [power_of_two(value) for value in (None, 1, 64)] == [None, 1, 64]
    with pytest.raises(typer.BadParameter, match="3 is not a power of two"):
        power_of_two(3)
