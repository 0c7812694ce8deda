"""The command line: each command reads its options, calls one function, and prints what
it answers.
"""

import errno
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NoReturn

from ..encodings import print_in_any_encoding, printable
from ..errors import UsageError, nearest, shortened
from ..extras import EXTRAS
from ..files import FULL
from ..progress import CLOCK
from .app import MISTYPED, Interrupted, app

# What libraries log over their own installation as they are imported, no news to who
# runs a command: loggers, and words of the lines of each that are dropped. transformers
# imports torchao wherever it is installed.
DROPPED = {
    # kernels for another Python or another torch
    "torchao": ("Failed to load", "Skipping import of cpp extensions"),
    # kernels that it would fetch; transformers imports it
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU",),
    # torchao calls it
    "torch.utils._pytree": ("register_constant() on Enum subclasses",),
}


def main() -> None:
    """Run the command line: bad input is one line on stderr and exit code 2;
    interrupted, 130.
    """
    print_in_any_encoding()
    drop_chatter()
    CLOCK.begin()
    try:
        _refuse_names(sys.argv[1:])
        with _own_manners():
            sys.exit(app(prog_name="notall", standalone_mode=False))
    except UsageError as error:
        _fail(str(error))
    except MISTYPED as error:
        _fail(_mistake_of(error))
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _fail(f"this needs {error.name}: pip install 'notall[{extra}]'")
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            name = shortened(str(error.filename))
            _fail(f"{name}: {os.strerror(error.errno)}; give another name")
        if error.errno not in (*FULL, errno.EACCES, errno.EROFS):
            raise
        where = f" ({error.filename})" if error.filename else ""
        _fail(
            f"{os.strerror(error.errno)}{where}: what is finished is kept; choose"
            " another folder or free some space"
        )
    except (Interrupted, KeyboardInterrupt):
        print(
            "interrupted: what is finished is kept; run the same command again to"
            " go on",
            file=sys.stderr,
        )
        sys.exit(130)


@cache
def drop_chatter() -> None:
    """Drop the lines of `DROPPED` from the logs of this process."""
    for name, words in DROPPED.items():
        logging.getLogger(name).addFilter(partial(_is_news, words))


def _is_news(words: tuple[str, ...], record: logging.LogRecord) -> bool:
    return not any(word in record.getMessage() for word in words)


def _refuse_names(words: Sequence[str]) -> None:
    """Raise `UsageError` for words that are not UTF-8: safetensors and records cannot
    hold them.
    """
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            fix = "rename the file or folder, or write the text again"
            raise UsageError(f"{shortened(word)} is not UTF-8: {fix}") from None


def _mistake_of(error: Any) -> str:
    """Typer's message on a command, an option or a value that it cannot read, and where
    the right ones are.
    """
    message = error.format_message().strip().removesuffix(".")
    message = message.replace("Value error, ", "")
    where = error.ctx.command_path if error.ctx else "notall"
    if wrong := re.search("'([^']*)' is not one of (.*)", message):
        message += nearest(wrong[1], re.findall("'([^']*)'", wrong[2]))
    return f"{shortened(message, 200)}; see `{where} --help`"


@contextmanager
def _own_manners() -> Iterator[None]:
    """Inside, a warning is one line, and signals end by an exception: half-written
    folders go.

    SIGTERM and, where the terminal goes, SIGHUP, unless that is ignored, as under
    nohup.
    """

    def end(number: int, frame: object) -> NoReturn:
        sys.exit(128 + number)

    # no other thread may say what signals do
    is_main = threading.current_thread() is threading.main_thread()
    caught = [signal.SIGTERM] if is_main else []
    if is_main and (hangup := getattr(signal, "SIGHUP", None)):
        caught += [hangup] if signal.getsignal(hangup) is not signal.SIG_IGN else []
    before = {number: signal.signal(number, end) for number in caught}
    usual_format = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: (
        f"warning: {' '.join(printable(str(message)).split())}\n"
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of code that is no user's
            yield
    finally:
        warnings.formatwarning = usual_format
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(message: str) -> None:
    print(f"error: {' '.join(printable(message).split())}", file=sys.stderr)
    sys.exit(2)
