"""A disk that fills up while a file is written."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from api import records_lines


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: a write stops in the middle, as on a full
    disk.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def fills_up(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """No line finds room in the file of that name."""
    write = records_lines._write

    def full(file: IO[bytes], lines: bytes) -> None:
        if Path(str(file.name)).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, lines)

    monkeypatch.setattr(records_lines, "_write", full)
