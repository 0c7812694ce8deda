"""Text that came from elsewhere, as a terminal may show it: names of models, tasks and files are data, not commands."""

import codecs
import io
import sys

IN_WORDS = "notall.in_words"  # what a stream does with a sign that its encoding lacks
ASCII = {"Δ": "delta ", "±": "+-", "×": "x", "–": "-", "−": "-", "…": "...", "’": "'"}


def printable(text: str, encoding: str = "utf-8") -> str:
    """`text` in one line: what steers the terminal, or is missing from `encoding`, is spelt out, such as `\\x1b`."""
    spelt = "".join(sign if sign.isprintable() else " " if sign.isspace() else _escape(sign) for sign in text)
    return spelt.encode(encoding, IN_WORDS).decode(encoding)


def print_in_any_encoding() -> None:
    """Let stdout and stderr spell out what their encoding lacks, where Python would raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=IN_WORDS)


def _escape(sign: str) -> str:
    return sign.encode("unicode_escape").decode()


def _in_words(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(ASCII.get(sign) or _escape(sign) for sign in error.object[error.start : error.end]), error.end


codecs.register_error(IN_WORDS, _in_words)
