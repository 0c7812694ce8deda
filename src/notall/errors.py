"""What a user did wrong, said in one line."""

import difflib
import traceback
from collections.abc import Sequence
from os import PathLike
from pathlib import Path


class UsageError(ValueError):
    """Bad input: the message is one clear line that names the fix. The command line prints it and exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # what it quotes of a file may hold line breaks


class UnsupportedModel(UsageError):
    """The model is not an embedding, a residual stream of sublayers and a head; the message says where it differs."""


class UnknownArchitecture(UsageError):
    """An engine has no code for this architecture at all, whatever its files hold."""


def raised_in(package: str, error: BaseException) -> bool:
    """Whether `error` comes out of the code of `package`, and not out of what that called."""
    *_, frame = traceback.extract_tb(error.__traceback__)
    return package in Path(frame.filename).parts


def nearest(word: object, names: Sequence[str]) -> str:
    """` (did you mean NAME?)` where one of `names` is like `word`, else nothing."""
    near = difflib.get_close_matches(str(word)[:200], names, 1)
    return f" (did you mean {shortened(near[0])}?)" if near else ""


def shortened(given: object, most: int = 80) -> str:
    """What a user gave, as a message quotes it: one printable line, of a long path its end, else its beginning."""
    line = " ".join(str(given).split())
    if len(line) > most:
        line = f"…{line[1 - most :]}" if isinstance(given, PathLike) else f"{line[: most - 1]}…"
    return "".join(letter if letter.isprintable() else "�" for letter in line)
