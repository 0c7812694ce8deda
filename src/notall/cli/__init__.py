"""The command line: each command reads its options, calls one function, and prints what it answers."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from ..errors import UsageError, nearest, shortened
from ..extras import EXTRAS
from ..results.printable import print_in_any_encoding, printable
from . import (  # noqa: F401  (they add their commands)
    bench,
    compare,
    draft,
    evaluate,
    export,
    inspect,
    paper,
    pareto,
    repair,
    report,
    search,
    sweep,
    tasks,
)
from .app import Interrupted, app
from .chatter import drop_chatter

# What Typer raises over words that it cannot read; its releases keep the class in different places.
MISTYPED: type[Exception] = typer.BadParameter.__bases__[0]


def main() -> None:
    """Run the command line: bad input is one line on stderr and exit code 2; interrupted, 130."""
    print_in_any_encoding()
    drop_chatter()
    try:
        with _termination_raises(), _warnings_in_a_line():
            sys.exit(app(prog_name="notall", standalone_mode=False))
    except UsageError as error:
        _fail(str(error))
    except MISTYPED as error:
        _fail(_told(error))
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _fail(f"this needs {error.name}: pip install 'notall[{extra}]'")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"{os.strerror(error.errno)}{where}: what is finished is kept; choose another folder or free some space")
    except (Interrupted, KeyboardInterrupt):
        print("interrupted: what is finished is kept; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def _told(error: Any) -> str:
    """What Typer says of a command, an option or a value that it cannot read, and where the right ones are."""
    said = error.format_message().strip().removesuffix(".").replace("Value error, ", "")
    where = error.ctx.command_path if error.ctx else "notall"
    if wrong := re.search("'([^']*)' is not one of (.*)", said):
        said += nearest(wrong[1], re.findall("'([^']*)'", wrong[2]))
    return f"{shortened(said, 200)}; see `{where} --help`"


@contextmanager
def _termination_raises() -> Iterator[None]:
    """Inside, SIGTERM ends by an exception, so that half-written folders are taken away."""

    def end(number: int, frame: object) -> NoReturn:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # no other may say what signals do
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Inside, a warning is what it says, without the line of code that it comes from."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(printable(str(message)).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _fail(message: str) -> None:
    print(f"error: {' '.join(printable(message).split())}", file=sys.stderr)
    sys.exit(2)
