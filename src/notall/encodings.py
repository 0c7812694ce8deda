"""Text for a terminal of any encoding: a character that it cannot show is spelt out."""

import codecs
import io
import sys

IN_WORDS = "notall.in_words"  # what a stream does with a sign that its encoding lacks
ASCII = {"Δ": "delta ", "±": "+-", "×": "x", "–": "-", "−": "-", "…": "...", "’": "'"}


def printable(text: str, encoding: str = "utf-8") -> str:
    """`text` in one line: what steers the terminal, or is missing from `encoding`, is
    spelt out, such as `\\x1b`.
    """
    spelt = "".join(
        character
        if character.isprintable()
        else " "
        if character.isspace()
        else ascii(character)[1:-1]
        for character in text
    )
    return spelt.encode(encoding, IN_WORDS).decode(encoding)


def print_in_any_encoding() -> None:
    """Let stdout and stderr spell out what their encoding lacks, where Python would
    raise.
    """
    sys.stdout, sys.stderr = (
        sys.stdout or io.StringIO(),
        sys.stderr or io.StringIO(),
    )  # they may be closed
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=IN_WORDS)


def _in_words(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return (
        "".join(
            ASCII.get(character) or ascii(character)[1:-1]
            for character in error.object[error.start : error.end]
        ),
        error.end,
    )


codecs.register_error(IN_WORDS, _in_words)
