"""Files of JSON lines that are only ever added to: what is written stays, and each line
ends with its digest.
"""

import errno
import json
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from ..errors import UsageError, shortened
from ..files import refuse_endless, writing
from ..integrity import sealed, unsealed
from ..strict_json import Settings, read_json

MOST_BYTES = 1 << 24  # of a line; none that notall writes has a thousandth


def append(path: Path, *lines: Settings) -> None:
    """Add `lines` to a file, on disk when this returns.

    Raises `UsageError` where it stays as it was, as it does for a link.
    """
    refuse_link(path)
    text = b"".join(
        sealed(json.dumps(finite(line), allow_nan=False).encode()) + b"\n"
        for line in lines
    )
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0, opener=_open_no_link) as file:
            _write(file, text)


def refuse_link(path: Path) -> None:
    """Raise `UsageError` for a link: the file that it leads to may be anything."""
    if path.is_symlink():
        fix = "put the file itself there, or choose another folder"
        raise UsageError(f"{shortened(path)} is a link: {fix}")


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def read_lines(path: Path) -> list[Settings]:
    """The lines of a file in their order; [] without a file. Raises as `numbered` and
    `parsed` do.
    """
    return [parsed(path, number, text) for number, text in numbered(path)]


def numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    """A file's lines by their numbers, from 1, JSON or not; a torn last one is dropped
    with a warning.
    """
    try:
        refuse_endless(path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for number, text in enumerate(
                iter(lambda: file.readline(min(size - file.tell(), MOST_BYTES)), b""), 1
            ):
                if len(text) == MOST_BYTES:
                    raise UsageError(
                        f"line {number} of {path} has {MOST_BYTES:,} bytes or more;"
                        " delete that line"
                    )
                if not text.endswith(b"\n") and _parse(text) is None:
                    warnings.warn(
                        f"the last line of {path} was torn by an interruption and is"
                        " dropped",
                        stacklevel=2,
                    )
                elif (line := unsealed(text)) is None:
                    fix = 'delete that line, or, to keep it, its "sealed"'
                    raise UsageError(
                        f"line {number} of {path} was changed since it was written:"
                        f" {fix}"
                    )
                elif line.strip():
                    yield number, line.rstrip(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        problem = f"cannot read {shortened(path, 200)}: {error.strerror}"
        raise UsageError(f"{problem}; give another file or folder") from None


def parsed(path: Path, number: int, text: bytes) -> Settings:
    """The record in a line. Raises `UsageError` that names it where there is none."""
    line = _parse(text)
    if line is None:
        raise UsageError(
            f"line {number} of {path} is no JSON record; repair or delete that line"
        )
    return line


def refuse_unwritable(folder: Path) -> None:
    """Raise `UsageError` where `folder`, or what it would be made in, can't be written.
    Makes nothing.
    """
    with writing(folder):
        place = next(
            path
            for path in (folder, *folder.absolute().parents)
            if path.exists() or path.is_symlink()
        )
        wrong = errno.ENOTDIR if not place.is_dir() else errno.EACCES
        if wrong == errno.ENOTDIR or not os.access(place, os.W_OK | os.X_OK):
            raise OSError(wrong, os.strerror(wrong))


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep `folder` for this process; one that was made for this, and that nothing came
    into, goes again.

    Raises `UsageError` when another has it, and when it can't be written.
    """
    place = folder / ".lock"
    refuse_link(place)
    if (
        place.is_file() and place.stat().st_size
    ):  # some releases of filelock would empty it
        raise UsageError(
            f"{shortened(place)} is there, and notall did not write it: choose another"
            " folder"
        )
    held = FileLock(place, timeout=0)
    made = [*takewhile(_is_absent, (folder, *folder.parents))]
    with writing(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.acquire()
        except Timeout:
            raise UsageError(
                f"another run is working in {folder}; wait for it, or choose another"
                " folder"
            ) from None
    try:
        yield
    finally:
        if made and [*folder.iterdir()] == [folder / ".lock"]:
            with suppress(OSError):
                (folder / ".lock").unlink()
                for path in made:  # the innermost first
                    path.rmdir()
        held.release()


def _is_absent(folder: Path) -> bool:
    return not folder.exists()


def finite(value: object) -> Any:
    """`value` as it is written: JSON has no nan and no infinity, and no tuples."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(file: IO[bytes], lines: bytes) -> None:
    """Behind the last whole line: what follows it, a line that was torn, is cut off, or
    has only to end.
    """
    last, end = b"", os.fstat(file.fileno()).st_size
    if end:
        with mmap(file.fileno(), 0, access=ACCESS_READ) as whole:
            last = whole[whole.rfind(b"\n") + 1 :]
    if _parse(last) is not None:
        lines = b"\n" + lines
    elif last:
        end -= len(last)
        file.truncate(end)
    try:
        while lines:
            lines = lines[file.write(lines) :]
        os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            file.truncate(end)
        raise


def _parse(text: bytes) -> Settings | None:
    """The record in a line; None if there is none. Part of a record is never one: a
    torn line shows.
    """
    try:
        line = read_json(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None
