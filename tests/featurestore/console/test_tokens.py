"""Files of tokens: what counts as one, and each mistake as one line and exit code 2."""

from pathlib import Path

import pytest

from featurestore.console.files import read_tokens
from featurestore.errors import USAGE, TokenFileError


def test_tokens_are_lines_that_are_not_empty_and_no_comments(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("# of the notebooks\n0123456789abcdef0123\n\nfedcba98765432100123 \n")
    assert read_tokens(file) == ["0123456789abcdef0123", "fedcba98765432100123"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no token; write one a line"),
        (b"# a comment\n\n", "has no token; write one a line"),
        (b"0123456789abcdef\nshort\n", "token 2 has 5 characters and can be guessed; write 16 or more"),
        (b"0123456789abcdef with space\n", "token 1 has a space"),
        (b"0123456789\x01abcdef\n", "token 1 has a space or a control character"),
        ("\u00e4".encode() * 20, "is not ASCII text"),
        (None, "No such file or directory; name a file"),
    ],
)
def test_wrong_files_are_one_line_each(tmp_path: Path, content: bytes | None, words: str) -> None:
    file = tmp_path / "tokens"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(TokenFileError, match=words) as raised:
        read_tokens(file)
    assert str(raised.value).startswith(f"--token-file {file}")
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == USAGE
