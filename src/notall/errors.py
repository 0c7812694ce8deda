"""What a user did wrong, or has not installed, in one line; names from elsewhere as a
terminal may show them.
"""

import codecs
import difflib
import io
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from os import PathLike
from pathlib import Path

IN_WORDS = "notall.in_words"  # what a stream does with a sign that its encoding lacks
ASCII = {"Δ": "delta ", "±": "+-", "×": "x", "–": "-", "−": "-", "…": "...", "’": "'"}
FIGURES = ("altair", "vl_convert")
# Which extra brings a module that not every command needs.
EXTRAS = dict.fromkeys((*FIGURES, "jinja2"), "report")
EXTRAS |= {"lm_eval": "eval", "scipy": "solver", "reasoning_gym": "reasoning"}


class UsageError(ValueError):
    """Bad input: the message is one clear line that names the fix. The command line
    prints it and exits with 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(
            " ".join(message.splitlines())
        )  # what it quotes of a file may hold line breaks


class UnsupportedModel(UsageError):
    """The model is not an embedding, a residual stream of sublayers and a head; the
    message says where it differs.
    """


class UnknownArchitecture(UsageError):
    """An engine has no code for this architecture at all, whatever its files hold."""


@contextmanager
def raised_by(package: str, what: str, fix: str) -> Iterator[None]:
    """Make a `UsageError` of what the code of `package` itself raises over a user's
    file, and not what that calls.
    """
    try:
        yield
    except (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        *_, frame = traceback.extract_tb(error.__traceback__)
        too_large = "overflow" in str(
            error
        )  # of a number, as torch says it; what else it raises is no fault of a file
        if package not in Path(frame.filename).parts or (
            isinstance(error, RuntimeError) and not too_large
        ):
            raise
        said = shortened(f"{type(error).__name__}: {error}", 160)
        raise UsageError(f"{what}: {said}; {fix}") from error


def expect(given: object, kind: type | tuple[type, ...], give: str) -> None:
    """Raise `UsageError` that says what to give, where `given` is no `kind`."""
    if not isinstance(given, kind):
        inside = (
            "; it is in its .plan"
            if isinstance(getattr(given, "plan", None), kind)
            else ""
        )
        raise UsageError(f"give {give}, not {type(given).__name__}{inside}")


def nearest(word: object, names: Sequence[str]) -> str:
    """` (did you mean NAME?)` where one of `names` is like `word`, else nothing."""
    near = difflib.get_close_matches(str(word)[:200], names, 1)
    return f" (did you mean {shortened(near[0])}?)" if near else ""


def shortened(given: object, most: int = 80) -> str:
    """What a user gave, as a message quotes it: one printable line, of a long path its
    end, else its beginning.
    """
    line = " ".join(str(given).split())
    if len(line) > most:
        line = (
            f"…{line[1 - most :]}"
            if isinstance(given, PathLike)
            else f"{line[: most - 1]}…"
        )
    return "".join(letter if letter.isprintable() else "�" for letter in line)


def installed(*modules: str) -> bool:
    return all(find_spec(module) for module in modules)


def need(*modules: str) -> None:
    """Raise `UsageError` unless all of these are installed: before any work is done
    that would be lost.
    """
    for module in modules:
        if not installed(module):
            raise UsageError(
                f"this needs {module}: pip install 'notall[{EXTRAS[module]}]'"
            )


def printable(text: str, encoding: str = "utf-8") -> str:
    """`text` in one line: what steers the terminal, or is missing from `encoding`, is
    spelt out, such as `\\x1b`.
    """
    spelt = "".join(
        sign if sign.isprintable() else " " if sign.isspace() else ascii(sign)[1:-1]
        for sign in text
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
            ASCII.get(sign) or ascii(sign)[1:-1]
            for sign in error.object[error.start : error.end]
        ),
        error.end,
    )


codecs.register_error(IN_WORDS, _in_words)
