"""Text as a person sees it: in one line, with what cannot be seen spelled out."""


def printable(text: str) -> str:
    r"""Return `text` with what cannot be seen spelled out, e.g. a line break as \n and a stray byte as \xff."""
    return text if text.isprintable() else "".join(map(_spelled, text))


def one_line(error: Exception | str) -> str:
    """Return the message of another library, whatever its layout, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _spelled(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # how Python carries a byte that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
