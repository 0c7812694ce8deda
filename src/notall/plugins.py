"""What others add to notall: by an entry point of their package, or named in place as
`module:function`.
"""

import hashlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import PathEntryFinder
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    SourceFileLoader,
)
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar

from .errors import UsageError, nearest, shortened

T = TypeVar("T")


@dataclass(frozen=True)
class Permitted:
    """The functions that a record may run: of modules in `folder`, in files of these
    SHA-256.
    """

    folder: Path | None
    sha256: Mapping[str, str]  # of the file of each module:function

    def check(self, name: str) -> Path:
        """The file of `module:function`, not yet imported.

        Raises `UsageError` for any without a folder, and for another file than was
        recorded.
        """
        if self.folder is None:
            fix = "read its file, and give the folder that it is in (--functions DIR)"
            told = (
                f"a record does not run functions, and this one names {shortened(name)}"
            )
            raise UsageError(f"{told}: {fix}")
        file = _file_in(self.folder, name.partition(":")[0])
        if file is None:
            told = f"{shortened(self.folder)} has no module of {shortened(name)}"
            raise UsageError(f"{told}: give another --functions")
        if hashlib.sha256(file.read_bytes()).hexdigest() != self.sha256.get(name):
            fix = "give the folder with the file as it was (--functions DIR)"
            told = (
                f"{shortened(file)} is not the file that {shortened(name)} was recorded"
                " with"
            )
            raise UsageError(f"{told}: {fix}")
        return file


# None where the user names the functions, and no record does.
PERMITTED = ContextVar[Permitted | None]("what a record may run", default=None)


def installed_names(group: str) -> list[str]:
    """The names that installed packages add to a group of entry points; nothing is
    imported.
    """
    return sorted({point.name for point in entry_points(group=group)})


def named(
    name: str,
    built_in: Mapping[str, Any],
    group: str,
    what: str,
    form: str = "module:function",
) -> Any:
    """One of `built_in`, or what `find` finds. Raises `UsageError` for another, and as
    `find` does.
    """
    found = built_in.get(name) or find(name, group)
    if found is None:
        names = [*built_in, *installed_names(group)]
        told = f"there is no {what} {shortened(name)!r}{nearest(name, names)}"
        raise UsageError(f"{told}: choose from {', '.join(names)}, or give {form}")
    return found


def class_named(
    name: str, built_in: Mapping[str, str], group: str, what: str, base: type[T]
) -> type[T]:
    """A subclass of `base`, which one of `built_in` names as `module:Class`, or what
    `find` finds; raises alike.
    """
    where = built_in.get(name)
    found = (
        EntryPoint(name, where, group).load()
        if where
        else named(name, built_in, group, what, "module:Class")
    )
    if not inspect.isclass(found) or not issubclass(found, base):
        raise UsageError(
            f"{shortened(name)} is no {what}: give a subclass of"
            f" {base.__module__}.{base.__name__}"
        )
    values = {
        name for name, hint in base.__annotations__.items() if "ClassVar" in str(hint)
    }
    lacking = {
        *getattr(found, "__abstractmethods__", ()),
        *(name for name in values if not hasattr(found, name)),
    }
    if lacking:
        raise UsageError(
            f"{shortened(name)} lacks {', '.join(sorted(lacking))}: give it what"
            f" {base.__name__} asks for"
        )
    return found


def find(name: str, group: str) -> Any | None:
    """What an entry point of `group` or `module:function` names, imported; None for
    other names.

    Raises `UsageError` for what is not there or fails, and for what a record may not
    run.
    """
    for point in entry_points(group=group):
        if point.name == name:
            of = f" of {point.dist.name}" if point.dist else ""
            return _loaded(
                point.value, f"{shortened(name)} ({shortened(point.value)}{of})"
            )
    if ":" not in name:
        return None
    permitted = PERMITTED.get()
    file = permitted.check(name) if permitted else None
    with importing_from(
        permitted.folder if permitted and permitted.folder else Path.cwd()
    ):
        found = _loaded(name, shortened(name))
    if file and _source_file(name) != file.resolve():
        told = f"{shortened(name)} is of another module than {shortened(file)}"
        raise UsageError(f"{told}: rename that file")
    _NAMED.add(name)
    return found


_NAMED = set[str]()  # each module:function that was found


def source_of(name: str) -> dict[str, str]:
    """For a provenance: a hash of the file of `module:function`, which may change, once
    it is imported.
    """
    file = _source_file(name)
    return (
        {"function_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        if file
        else {}
    )


def functions_in(words: Sequence[str]) -> dict[str, str]:
    """Each imported `module:function` that a command names, with the SHA-256 of its
    file.
    """
    named = (
        name for name in sorted(_NAMED) if any(word.endswith(name) for word in words)
    )
    return {name: sha256 for name in named for sha256 in source_of(name).values()}


@contextmanager
def importing_from(folder: Path) -> Iterator[None]:
    """Inside, Python looks for modules in a folder, too, behind all else: it hides no
    library.

    Its files run as they are written: bytecode beside them, which may be other code, is
    not read.
    """
    here, is_new = str(folder.absolute()), str(folder.absolute()) not in sys.path
    kinds = (_AsWritten, SOURCE_SUFFIXES), (ExtensionFileLoader, EXTENSION_SUFFIXES)
    finder = FileFinder.path_hook(*kinds)

    def hook(path: str) -> PathEntryFinder:
        if not Path(path).is_relative_to(here):
            raise ImportError
        return finder(path)

    _forget_finders(here)
    sys.path_hooks.insert(0, hook)
    if is_new:
        sys.path.append(here)
    try:
        yield
    finally:
        sys.path_hooks.remove(hook)
        if is_new and here in sys.path:
            sys.path.remove(here)
        _forget_finders(here)


def _forget_finders(folder: str) -> None:
    """Have Python ask its hooks again how a folder, and those in it, are read."""
    for path in [*sys.path_importer_cache]:
        if Path(path).is_relative_to(folder):
            del sys.path_importer_cache[path]


class _AsWritten(SourceFileLoader):
    """Runs the source of a module, and neither reads nor writes its bytecode."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Make one line of what code of others raises: what it was, and where in their
    code.
    """
    try:
        yield
    except (UsageError, MemoryError):
        raise
    except (
        Exception,
        SystemExit,
    ) as error:  # the latter would end the command as if it had done its work
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


def _file_in(folder: Path, module: str) -> Path | None:
    """The source of a module that a folder holds; nothing is imported."""
    place = folder.joinpath(*module.split("."))
    files = (place / "__init__.py", place.with_name(f"{place.name}.py"))
    return next(filter(Path.is_file, files), None)


def _source_file(name: str) -> Path | None:
    """The file of `module:function`, once it is imported."""
    module, colon, _ = name.partition(":")
    file = getattr(sys.modules.get(module), "__file__", None) if colon else None
    return Path(file).resolve() if file else None


def _loaded(value: str, told: str) -> Any:
    """What stands behind `module:function`."""
    found = EntryPoint.pattern.fullmatch(value)
    if not found or not found["attr"]:
        raise UsageError(
            f"{told} names nothing: write module:function, such as mine:score_size"
        )
    module = found["module"]
    try:
        holder: Any = import_module(module)
    except (Exception, SystemExit) as error:  # their code may raise anything, and exit
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(
            f"{error.name}."
        ):
            where = "put its file into this folder, or install its package"
            raise UsageError(
                f"there is no {told}: no module is called {shortened(error.name)};"
                f" {where}"
            ) from error
        raise UsageError(f"{told} fails as it is imported: {_where(error)}") from error
    for name in found["attr"].split("."):
        if not hasattr(holder, name):
            near = nearest(name, dir(holder))
            own = [
                key
                for key, value in vars(holder).items()
                if getattr(value, "__module__", None) == module
            ]
            lists = f"; it has {shortened(', '.join(own))}" if own and not near else ""
            raise UsageError(
                f"there is no {told}: {module} has no {shortened(name)}{near}{lists}"
            )
        holder = getattr(holder, name)
    return holder


def _where(error: BaseException) -> str:
    """What was raised, and in which line of theirs: not in notall's own, nor in an
    installed package.
    """
    said = shortened(f"{type(error).__name__}: {error}", 120)
    if isinstance(error, SyntaxError):  # which says it
        return said
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<")
    ]
    ours = os.path.dirname(__file__)
    theirs = [
        one
        for one in frames
        if not one.filename.startswith(ours) and "site-packages" not in one.filename
    ]
    last = (theirs or frames)[-1]
    return f"{said} ({os.path.basename(last.filename)}, line {last.lineno})"
