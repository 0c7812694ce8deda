"""What others add to notall: by an entry point of their package, or named in place as `module:function`."""

import hashlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from .errors import UsageError, nearest, shortened

T = TypeVar("T")


def installed_names(group: str) -> list[str]:
    """The names that installed packages add to a group of entry points; nothing is imported."""
    return sorted({point.name for point in entry_points(group=group)})


def named(name: str, built_in: Mapping[str, Any], group: str, what: str, form: str = "module:function") -> Any:
    """One of `built_in`, or what `find` finds. Raises `UsageError` for another, and as `find` does."""
    found = built_in.get(name) or find(name, group)
    if found is None:
        names = [*built_in, *installed_names(group)]
        told = f"there is no {what} {shortened(name)!r}{nearest(name, names)}"
        raise UsageError(f"{told}: choose from {', '.join(names)}, or give {form}")
    return found


def class_named(name: str, built_in: Mapping[str, str], group: str, what: str, base: type[T]) -> type[T]:
    """A subclass of `base`, which one of `built_in` names as `module:Class`, or what `find` finds; raises alike."""
    where = built_in.get(name)
    found = EntryPoint(name, where, group).load() if where else named(name, built_in, group, what, "module:Class")
    if not inspect.isclass(found) or not issubclass(found, base):
        raise UsageError(f"{shortened(name)} is no {what}: give a subclass of {base.__module__}.{base.__name__}")
    values = {name for name, hint in base.__annotations__.items() if "ClassVar" in str(hint)}
    lacking = {*getattr(found, "__abstractmethods__", ()), *(name for name in values if not hasattr(found, name))}
    if lacking:
        raise UsageError(f"{shortened(name)} lacks {', '.join(sorted(lacking))}: give it what {base.__name__} asks for")
    return found


def find(name: str, group: str) -> Any | None:
    """What an entry point of `group` or `module:function`, which is run, names; None for other names."""
    for point in entry_points(group=group):
        if point.name == name:
            of = f" of {point.dist.name}" if point.dist else ""
            return _loaded(point.value, f"{shortened(name)} ({shortened(point.value)}{of})")
    return _loaded(name, shortened(name)) if ":" in name else None


def source_of(name: str) -> dict[str, str]:
    """For a provenance: a hash of the file of `module:function`, which may change, once it is imported."""
    file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None) if ":" in name else None
    return {"function_sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest()} if file else {}


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Make one line of what code of others raises: what it was, and where in their code."""
    try:
        yield
    except (UsageError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # the latter would end the command as if it had done its work
        raise UsageError(f"{shortened(name)} failed: {_where(error)}") from error


def takes(function: Callable[..., object], count: int) -> bool:
    """Whether a function can be called with so many arguments, by their places."""
    with suppress(TypeError):
        inspect.signature(function).bind(*[None] * count)
        return True
    return False


def first_line(function: object) -> str:
    """What a function of others says of itself, without a full stop."""
    return (inspect.getdoc(function) or "").partition("\n")[0].rstrip(".")


def _loaded(value: str, told: str) -> Any:
    """What stands behind `module:function`."""
    found = EntryPoint.pattern.fullmatch(value)
    if not found or not found["attr"]:
        raise UsageError(f"{told} names nothing: write module:function, such as mine:score_size")
    module, here = found["module"], os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # behind all else: a folder called datasets hides no library
    try:
        holder: Any = import_module(module)
    except (Exception, SystemExit) as error:  # their code may raise anything, and exit
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            where = "put its file into this folder, or install its package"
            raise UsageError(f"there is no {told}: no module is called {shortened(error.name)}; {where}") from error
        raise UsageError(f"{told} fails as it is imported: {_where(error)}") from error
    for name in found["attr"].split("."):
        if not hasattr(holder, name):
            near = nearest(name, dir(holder))
            own = [key for key, value in vars(holder).items() if getattr(value, "__module__", None) == module]
            lists = f"; it has {shortened(', '.join(own))}" if own and not near else ""
            raise UsageError(f"there is no {told}: {module} has no {shortened(name)}{near}{lists}")
        holder = getattr(holder, name)
    return holder


def _where(error: BaseException) -> str:
    """What was raised, and in which line of theirs: not in notall's own, nor in an installed package."""
    said = shortened(f"{type(error).__name__}: {error}", 120)
    if isinstance(error, SyntaxError):  # which says it
        return said
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    ours = os.path.dirname(__file__)
    theirs = [one for one in frames if not one.filename.startswith(ours) and "site-packages" not in one.filename]
    last = (theirs or frames)[-1]
    return f"{said} ({os.path.basename(last.filename)}, line {last.lineno})"
