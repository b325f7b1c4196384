"""Text as a person sees it: in one line, with what cannot be seen spelled out."""

import re
from collections.abc import Sequence

_PASSWORD = re.compile(r"(://[^\s/@:]*):[^\s/]*@")


def printable(text: str) -> str:
    r"""Return `text` with what cannot be seen spelled out, e.g. a line break as \n and a stray byte as \xff."""
    return text if text.isprintable() else "".join(map(_spelled, text))


def one_line(error: Exception | str) -> str:
    """Return the message of another library, whatever its layout, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def refusal(error: OSError) -> str:
    """Return why the system refused a file, without its name, which may be that of a temporary one."""
    return error.strerror or one_line(error)


def without_passwords(text: str) -> str:
    """Return `text` with the passwords of addresses hidden: https://user:***@host."""
    return _PASSWORD.sub(r"\1:***@", text)


def count_text(number: int, thing: str) -> str:
    """Format a number of things, e.g. `1 file` or `2,000 files`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def ranges_text(numbers: Sequence[int]) -> str:
    """Format ascending numbers in short, e.g. `1 to 3, 7, 8`."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    texts = (f"{group[0]} to {group[-1]}" if len(group) > 2 else ", ".join(map(str, group)) for group in groups)
    return ", ".join(texts)


def _spelled(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # how Python carries a byte that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
