"""Files: paths as users write them, JSON as its grammar has it, what of a model's
folder is read, and what is kept.
"""

import contextlib
import errno
import glob
import json
import math
import os
import platform
import re
import secrets
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Container, Iterator
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any
from zlib import crc32

from pydantic_core import from_json

from .errors import UsageError, shortened

Settings = dict[str, Any]  # a table of JSON, such as a config.json


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


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what is said of a disk without room
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


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"


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
        told = f"{shortened(folder.name)} names {shortened(name)}"
        raise UsageError(f"{told}: {error.strerror}; download it again") from None
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


def named_weights(spec: str | Path, config: object) -> str | None:
    """The file that a config names for the weights, in place of the usual ones. Raises
    `UsageError` for a pickle.
    """
    name = getattr(config, "transformers_weights", None)
    if name is None:
        return None
    is_plain = isinstance(name, str) and Path(name).name == name
    if not is_plain or not name.endswith((".safetensors", ".safetensors.index.json")):
        told = (
            f"the config of {shortened(str(spec))} names {shortened(str(name))} for the"
            " weights"
        )
        fix = "take transformers_weights out of config.json"
        raise UsageError(
            f"{told}: only safetensors files in its own folder are read; {fix}"
        )
    return name


def refuse_adapter(spec: str | Path, found: object) -> None:
    """transformers would merge a LoRA that lies beside a model in silence, where peft
    is installed, and else not.
    """
    if found:
        fix = (
            "merge it with peft's merge_and_unload and save the result, or take that"
            " file away"
        )
        raise UsageError(
            f"{shortened(str(spec))} has a LoRA beside the model ({ADAPTER}): {fix}"
        )


def cache_folder(*parts: str) -> Path:
    """`$NOTALL_CACHE` or `~/.cache/notall`, made for its owner alone if absent, or a
    folder in it.

    Raises `UsageError` where it can't be made, and where others can write what is read
    from it.
    """
    try:
        folder = Path(os.environ.get("NOTALL_CACHE") or "~/.cache/notall").expanduser()
        make_private(folder)
        for count in range(len(parts) + 1):
            if (one := folder.joinpath(*parts[:count])).exists():
                _refuse_open(one)
    except RuntimeError:
        raise UsageError(
            "there is no home directory for the cache: set NOTALL_CACHE to a folder"
        ) from None
    except OSError as error:
        raise unwritable(folder, error) from error
    return folder.joinpath(*parts)


def make_private(folder: Path) -> None:
    """Make a folder, and those that it is in, for their owner alone; what is there
    stays.
    """
    if not folder.is_dir():
        make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def _refuse_open(folder: Path) -> None:
    """Raise `UsageError` for a folder of the cache that others than its owner can
    write.
    """
    state = folder.stat()
    is_open = state.st_mode & stat.S_IWOTH
    if state.st_mode & stat.S_IWGRP:
        is_open = is_open or not _is_private_group(state.st_uid, state.st_gid)
    if is_open and os.name == "posix":
        fix = "take that right away (chmod go-w), or set NOTALL_CACHE to another"
        raise UsageError(
            f"others can write to the cache folder {shortened(folder)}: {fix}"
        )


def _is_private_group(user: int, group: int) -> bool:
    """Whether a group is a user's own: many systems make one of the same name for each
    user.
    """
    with contextlib.suppress(ImportError, KeyError):
        import grp
        import pwd

        found, name = grp.getgrgid(group), pwd.getpwuid(user).pw_name
        return found.gr_name == name and not {*found.gr_mem} - {name}
    return False


def keep(path: Path, content: str | bytes) -> None:
    """Write a file of the cache; where it can't be, only the next run is slower."""
    with contextlib.suppress(OSError):
        make_private(path.parent)
        write_whole(path, content)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: what is there already, a link too, is replaced,
    or stays.
    """
    with beside(path) as partial:
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
    """Whether `beside` called a file or folder of one of these names so while it was
    written.
    """
    match = PARTIAL.fullmatch(path.name)
    return match is not None and match["name"] in names


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A name for what is to become `path`, a file or a folder; what is left of it goes,
    as does that of killed runs.
    """
    from psutil import pid_exists  # not for a help

    for left in path.parent.glob(f"{glob.escape(f'.{path.name}.{_numbering()}.')}*"):
        process = PARTIAL.fullmatch(left.name)
        if process and not pid_exists(int(process["process"])):
            remove(left)
    partial = path.with_name(
        f".{path.name}.{_numbering()}.{os.getpid()}.{secrets.token_hex(3)}"
    )
    try:
        yield partial
    finally:
        remove(partial)


@cache
def _numbering() -> str:
    """A name for the processes that are numbered with this one: of this host and, in a
    container, of that alone.
    """
    space = ""
    with contextlib.suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return f"{crc32((platform.node() + space).encode()):08x}"


def remove(path: Path) -> None:
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
        told = f"cannot write {shortened(path)}: {error.strerror}"
        raise UsageError(f"{told}; choose another -o") from None
    with contextlib.suppress(UsageError):  # what readers of ours say of others' files
        if path.is_file() and (not path.stat().st_size or is_ours(path)):
            return
    raise UsageError(f"{shortened(path)} is there, and is no {what}: choose another -o")


def unwritable(folder: Path, error: OSError) -> UsageError:
    told = f"cannot write the cache folder {shortened(folder, 200)} ({error.strerror})"
    return UsageError(f"{told}: set NOTALL_CACHE to another")


class DoubledKey(ValueError):
    """An object has a key twice; the message is that key, in quotes."""


def read_json(text: str | bytes) -> Any:
    """The value of a UTF-8 text, without NaN, which Python's reader takes, and the last
    value of a doubled key.

    Raises `DoubledKey`, and `ValueError` for what is no JSON, has numbers too large, or
    is nested too deep.
    """
    from_json(
        text, allow_inf_nan=False
    )  # it knows how deep it is, where Python's reader overflows its stack
    return json.loads(text, object_pairs_hook=_each_key_once, parse_float=_finite)


def _each_key_once(pairs: list[tuple[str, Any]]) -> Settings:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise DoubledKey(f'"{key}"')
    return fields


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is beyond any number")
    return number
