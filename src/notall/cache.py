"""The cache of notall: files that are quicker to read than to make again, for their owner
alone.
"""

import contextlib
import os
import stat
from pathlib import Path

from .errors import UsageError, shortened
from .files import write_whole


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


def write_cached(path: Path, content: str | bytes) -> None:
    """Write a file of the cache; where it can't be, only the next run is slower."""
    with contextlib.suppress(OSError):
        make_private(path.parent)
        write_whole(path, content)


def unwritable(folder: Path, error: OSError) -> UsageError:
    """A refusal that names the cache's folder and what the system says."""
    problem = (
        f"cannot write the cache folder {shortened(folder, 200)} ({error.strerror})"
    )
    return UsageError(f"{problem}: set NOTALL_CACHE to another")
