"""What a user did wrong, or has not installed, in one line; names from elsewhere as a
terminal may show them.
"""

import difflib
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path


class UsageError(ValueError):
    """Bad input: the message is one clear line that names the fix. The command line
    prints it and exits with 2.
    """

    def __init__(self, message: str) -> None:
        # what it quotes of a file may hold line breaks
        super().__init__(" ".join(message.splitlines()))


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
        # torch's word for a number that is too large; its other errors are no fault of
        # a file
        too_large = "overflow" in str(error)
        is_torch = isinstance(error, RuntimeError) and not too_large
        if is_torch or package not in Path(frame.filename).parts:
            raise
        message = shortened(f"{type(error).__name__}: {error}", 160)
        raise UsageError(f"{what}: {message}; {fix}") from error


def expect(given: object, kind: type | tuple[type, ...], give: str) -> None:
    """Raise `UsageError` that says what to give, where `given` is no `kind`."""
    if not isinstance(given, kind):
        has_one = isinstance(getattr(given, "plan", None), kind)
        inside = "; it is in its .plan" if has_one else ""
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
        is_path = isinstance(given, PathLike)
        line = f"…{line[1 - most :]}" if is_path else f"{line[: most - 1]}…"
    return "".join(letter if letter.isprintable() else "�" for letter in line)
