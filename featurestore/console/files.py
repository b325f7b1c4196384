"""Files named on a command line: outputs replaced whole, certificates and tokens."""

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import typer

from featurestore.errors import OutputPlaceError, TokenFileError, UserError
from featurestore.problems import Problem
from featurestore.text import refusal


def replace_file(path: Path, content: str | bytes) -> None:
    """Write to a hidden file in the same folder and rename it: readers find all of the old content or all of the new.

    Raises OSError."""
    with replaced_file(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield a hidden path in the same folder, which is renamed to `path` at the end of the block.

    Where the block raises, its output is removed. Raises OSError, also where `path` is a folder, a device or a pipe,
    which would be gone.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, Problem.REPLACES_NO_FILE.of(), str(path))
    part = path.with_name(f".{path.name}")
    try:
        yield part
        part.replace(path)
    except BaseException:
        with suppress(OSError):  # the raised error says why
            part.unlink()
        raise


def check_ending(path: Path | str, option: str, *endings: str) -> None:
    """Raise typer.BadParameter unless the file of an option has a name with one of these endings."""
    if PurePosixPath(path).suffix not in endings:
        raise typer.BadParameter(Problem.WRONG_ENDING.of(path, " or ".join(endings)), param_hint=option)


def check_place(path: Path, option: str) -> None:
    """Raise OutputPlaceError where no file can be written at the path of an option; for before work that takes long."""
    if path.is_dir():
        raise OutputPlaceError(Problem.OUTPUT_IS_A_FOLDER, option, path)
    if path.exists() and not path.is_file():
        raise OutputPlaceError(Problem.OUTPUT_NOT_REGULAR, option, path)
    if not path.parent.is_dir():
        raise OutputPlaceError(Problem.OUTPUT_WITHOUT_FOLDER, option, path, path.parent)
    part = path.with_name(f".{path.name}")  # as replaced_file does
    try:
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666))
        part.unlink()
    except OSError as error:
        raise OutputPlaceError(Problem.OUTPUT_REFUSED, option, path, refusal(error)) from error


def _checked_json(context: typer.Context, value: Path | None) -> Path | None:
    if value is not None and not context.resilient_parsing:
        check_place(value, "--json")
    return value


JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write the figures to this file as well.", callback=_checked_json)
]
"""The option --json of commands of one process; that its file can be written is checked before the work begins."""


def write_json(path: Path, values: Any) -> None:
    """Write `values` as JSON by `replace_file`; numbers that are not finite become null. Raises OSError."""
    replace_file(path, json_text(values))


def json_text(values: Any) -> str:
    """Format `values` as the JSON of a file; numbers that are not finite become null."""
    return json.dumps(_finite(values), indent=2, allow_nan=False) + "\n"


def write_json_option(path: Path | None, values: Any) -> None:
    """Write the figures of a command to the file of its option --json, if that is given. Raises UserError."""
    try:
        if path is not None:
            write_json(path, values)
    except OSError as error:
        raise UserError(Problem.OUTPUT_REFUSED, "--json", path, refusal(error)) from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_SOON_DAYS = 14


def problem_of_dates(file: Path) -> str | None:
    """Return a warning where the first certificate of a PEM file has expired, is not valid yet, or expires soon.

    Returns None where it is well. Raises OSError, and ValueError for a file without a certificate."""
    from cryptography import x509  # most commands need no certificates

    certificate, now = x509.load_pem_x509_certificates(file.read_bytes())[0], datetime.now(UTC)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    refused = "clients that check certificates will refuse it"
    if end < now:
        return f"{file} expired at {end:%Y-%m-%d %H:%M:%S} UTC: {refused}"
    if begin > now:
        return f"{file} is not valid before {begin:%Y-%m-%d %H:%M:%S} UTC: {refused}"
    days = (end - now).days
    return f"{file} expires in {days} days" if days < _SOON_DAYS else None


FEWEST_CHARACTERS = 16
_EXAMPLE = "e.g. of `openssl rand -hex 32`"


def read_tokens(file: Path) -> list[str]:
    """Read the tokens in the file of --token-file, one a line; empty lines and those that begin with # do not count.

    Raises TokenFileError where there is no token, or one that is short or not plain ASCII.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="ascii").splitlines()]
    except OSError as error:
        raise TokenFileError(Problem.NO_TOKEN_FILE, file, error.strerror) from error
    except UnicodeDecodeError as error:
        raise TokenFileError(Problem.TOKENS_NOT_ASCII, file) from error
    tokens = [line for line in lines if line and not line.startswith("#")]
    if not tokens:
        raise TokenFileError(Problem.NO_TOKEN, file)
    for number, token in enumerate(tokens, start=1):
        if len(token) < FEWEST_CHARACTERS:
            raise TokenFileError(Problem.TOKEN_TOO_SHORT, file, number, len(token), FEWEST_CHARACTERS)
        if not token.isprintable() or " " in token:
            raise TokenFileError(Problem.TOKEN_NOT_PLAIN, file, number)
    return tokens
