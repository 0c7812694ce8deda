"""Text for a terminal of any encoding: a character that it cannot show is spelt out."""

import codecs
import io
import sys

IN_WORDS = (
    "notall.in_words"  # what a stream does with a character that is not in its encoding
)
ASCII = {"Δ": "delta ", "±": "+-", "×": "x", "–": "-", "−": "-", "…": "...", "’": "'"}


def printable(text: str, encoding: str = "utf-8") -> str:
    """`text` in one line: what steers the terminal, or is missing from `encoding`, is
    spelt out, such as `\\x1b`.
    """
    spelt = "".join(map(_spelt, text))
    return spelt.encode(encoding, IN_WORDS).decode(encoding)


def _spelt(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else _escape(character)


def _escape(character: str) -> str:
    """Such as `\\x1b`."""
    return ascii(character)[1:-1]


def print_in_any_encoding() -> None:
    """Let stdout and stderr spell out what is not in their encoding, where Python would
    raise.
    """
    # they may be closed
    sys.stdout = sys.stdout or io.StringIO()
    sys.stderr = sys.stderr or io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=IN_WORDS)


def _in_words(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    spelt = [ASCII.get(character) or _escape(character) for character in missing]
    return "".join(spelt), error.end


codecs.register_error(IN_WORDS, _in_words)
