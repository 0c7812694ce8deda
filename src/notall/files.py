"""Files: paths as users write them, JSON as its grammar has it, what of a model's
folder is read, and what is kept.
"""

import contextlib
import errno
import glob
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Container, Iterator
from functools import cache
from os import PathLike
from pathlib import Path
from zlib import crc32

from .errors import UsageError, shortened


def expanded(path: str | PathLike[str]) -> Path:
    """A path with the home directory in place of its ~. Raises UsageError where there
    is none.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(
            f"there is no home directory for {shortened(Path(path))}: write the path"
            " without ~"
        ) from None


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a disk without room
MOST_BYTES = 1 << 26  # of a file of settings: a hundred times as many as any has


def refuse_endless(path: Path) -> None:
    """Raise `UsageError` for what may never end, or never say a word."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UsageError(
            f"{shortened(path)} is a pipe or a device: give a regular file"
        )


def contents(path: Path, most: int = MOST_BYTES) -> bytes:
    """A file's bytes. Raises `UsageError` as `refuse_endless` does, and where they are
    more than `most`.
    """
    refuse_endless(path)
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > most:
            raise UsageError(
                f"{shortened(path)} has more than {most:,} bytes: give a smaller file,"
                " or a part of it"
            )
        return file.read()


def open_to_others(path: Path) -> None:
    """Let others read a file that was made for its owner alone, as far as the umask
    allows.
    """
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def own_file(folder: Path, name: str) -> Path | None:
    """The file of that name in a folder, or None. Raises `UsageError` for a name or a
    link that leads elsewhere.
    """
    if Path(name).name != name:
        raise UsageError(
            f"{folder.name} names {shortened(name)}, which is not in it; download it"
            " again"
        )
    try:
        if not (folder / name).is_file():
            return None
    except OSError as error:  # a name that is too long
        problem = f"{shortened(folder.name)} names {shortened(name)}"
        raise UsageError(f"{problem}: {error.strerror}; download it again") from None
    place, home = (folder / name).resolve(), folder.resolve()
    cached = (
        home.parent.name == "snapshots" and "--" in home.parent.parent.name
    )  # models--org--name/snapshots/commit
    if not place.is_relative_to(home) and not (
        cached and place.parent == home.parent.parent / "blobs"
    ):
        raise UsageError(
            f"{shortened(name)} of {folder.name} is a link out of that folder; put the"
            " file itself there"
        )
    return folder / name


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: what is there already, a link too, is replaced,
    or stays.
    """
    with temporary(path) as partial:
        with partial.open("xb") as file:  # never through what somebody put there
            file.write(content.encode() if isinstance(content, str) else content)
        take_name(partial, path)


def take_name(partial: Path, path: Path) -> None:
    """Rename a finished file. It is on disk before: a power cut leaves the old one or
    the new.
    """
    with partial.open("r+b") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    with contextlib.suppress(OSError):  # some systems cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def writing(
    what: object, fix: str = "make room or give access, or choose another folder"
) -> Iterator[None]:
    """Inside, what the system refuses is a `UsageError`: one line that says what cannot
    be written, and the fix.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write {shortened(what, 200)}: {error.strerror}; {fix}"
        ) from None


# Of what is being written: its name, the numbering of processes, the process, and a
# random word.
PARTIAL = re.compile(
    r"(?s)\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<process>[0-9]{1,9})\.[0-9a-f]{6}"
)


def is_partial(path: Path, names: Container[str]) -> bool:
    """Whether `temporary` called a file or folder of one of these names so while it was
    written.
    """
    match = PARTIAL.fullmatch(path.name)
    return match is not None and match["name"] in names


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A name for what is to become `path`, a file or a folder; what is left of it goes,
    as does that of killed runs.
    """
    from psutil import pid_exists  # not for a help

    for left in path.parent.glob(f"{glob.escape(f'.{path.name}.{_numbering()}.')}*"):
        process = PARTIAL.fullmatch(left.name)
        if process and not pid_exists(int(process["process"])):
            remove_path(left)
    partial = path.with_name(
        f".{path.name}.{_numbering()}.{os.getpid()}.{secrets.token_hex(3)}"
    )
    try:
        yield partial
    finally:
        remove_path(partial)


@cache
def _numbering() -> str:
    """A name for the processes that are numbered with this one: of this host and, in a
    container, of that alone.
    """
    space = ""
    with contextlib.suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return f"{crc32((platform.node() + space).encode()):08x}"


def remove_path(path: Path) -> None:
    """Remove a file, a link or a folder, as far as the system lets us."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Inside, safetensors raises `OSError` where a file cannot be written, as Python
    does.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        if not (number := re.search(r"os error (\d+)", str(error))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


def refuse_others(path: Path, is_ours: Callable[[Path], object], what: str) -> None:
    """Raise `UsageError` where a folder is, or a file that is neither empty nor ours;
    of a link only itself goes.
    """
    try:
        if path.is_symlink() or not path.exists():
            return
    except OSError as error:  # a name that is too long
        problem = f"cannot write {shortened(path)}: {error.strerror}"
        raise UsageError(f"{problem}; choose another -o") from None
    with contextlib.suppress(UsageError):  # what readers of ours say of others' files
        if path.is_file() and (not path.stat().st_size or is_ours(path)):
            return
    raise UsageError(f"{shortened(path)} is there, and is no {what}: choose another -o")
