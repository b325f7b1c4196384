"""Files of tokens: what a server lets clients in by, one token a line."""

from pathlib import Path

from featurestore.errors import TokenFileError

FEWEST_CHARACTERS = 16
_EXAMPLE = "e.g. of `openssl rand -hex 32`"


def read_tokens(file: Path, option: str = "--token-file") -> list[str]:
    """Read the tokens in a file, one a line; empty lines and those that begin with # do not count.

    `option`: the one that names the file, for messages. Raises TokenFileError where there is no token, or one that is
    short or no plain ASCII.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="ascii").splitlines()]
    except OSError as error:
        raise TokenFileError(f"{option} {file}: {error.strerror}; name a file with a token a line") from error
    except UnicodeDecodeError as error:
        raise TokenFileError(
            f"{option} {file} is no ASCII text; a token is a line of letters, digits and signs, {_EXAMPLE}"
        ) from error
    tokens = [line for line in lines if line and not line.startswith("#")]
    if not tokens:
        raise TokenFileError(f"{option} {file} has no token; write one a line, {_EXAMPLE}")
    for number, token in enumerate(tokens, start=1):
        if len(token) < FEWEST_CHARACTERS:
            raise TokenFileError(
                f"{option} {file}: token {number} has {len(token)} characters and can be guessed; write "
                f"{FEWEST_CHARACTERS} or more, {_EXAMPLE}"
            )
        if not token.isprintable() or " " in token:
            raise TokenFileError(
                f"{option} {file}: token {number} has a space or a control character; a token is letters, digits "
                f"and signs, {_EXAMPLE}"
            )
    return tokens
