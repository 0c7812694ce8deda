"""The command line: each command reads its options, calls one function, and prints what it answers."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
from typing import NoReturn

from ..errors import UsageError
from . import choosing, exporting, inspecting, measuring, paper, reporting  # noqa: F401  (they add their commands)
from .app import app

# Which extra brings a module that not every command needs.
EXTRAS = {"altair": "report", "vl_convert": "report", "jinja2": "report", "lm_eval": "eval", "pandas": "eval"}


def main() -> None:
    """Run the command line: bad input is one line on stderr and exit code 2; interrupted, 130."""
    for talker in ("torchao", "torch.utils._pytree"):  # transformers imports torchao where it is, which then warns
        logging.getLogger(talker).setLevel(logging.ERROR)
    if threading.current_thread() is threading.main_thread():  # no other may say what signals do
        signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except UsageError as error:
        _fail(str(error))
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
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)


def _terminated(number: int, frame: object) -> NoReturn:
    """End by an exception, so that half-written folders are taken away."""
    sys.exit(128 + number)


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
