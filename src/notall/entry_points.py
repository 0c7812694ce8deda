"""Find what others add to notall: an entry point of an installed package, or a
`module:function` that is named in place.

What they may import is in `plugins`.
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

# Of `notall.plugins`: higher when a name goes or changes its meaning.
API_VERSION = 1
NAMED_VERSION = "NOTALL_API"  # by which a plug-in's module says what it is written for


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
            raise UsageError(
                "a record does not run functions, and this one names"
                f" {shortened(name)}: read its file, and give the folder that it is in"
                " (--functions DIR)"
            )
        file = _file_in(self.folder, name.partition(":")[0])
        if file is None:
            raise UsageError(
                f"{shortened(self.folder)} has no module of {shortened(name)}: give"
                " another --functions"
            )
        if _sha256_of(file) != self.sha256.get(name):
            raise UsageError(
                f"{shortened(file)} is not the file that {shortened(name)} was recorded"
                " with: give the folder with the file as it was (--functions DIR)"
            )
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
        raise UsageError(
            f"there is no {what} {shortened(name)!r}{nearest(name, names)}: choose from"
            f" {', '.join(names)}, or give {form}"
        )
    return found


def class_named(
    name: str, built_in: Mapping[str, str], group: str, what: str, base: type[T]
) -> type[T]:
    """A subclass of `base`, which one of `built_in` names as `module:Class`, or what
    `find` finds.

    Raises `UsageError` as `named` does, for what is no subclass, and for a class
    without a method or a value that `base` asks for. `base` is a name of
    `notall.plugins`.
    """
    if name in built_in:
        found = EntryPoint(name, built_in[name], group).load()
    else:
        found = named(name, built_in, group, what, "module:Class")
    if not inspect.isclass(found) or not issubclass(found, base):
        raise UsageError(
            f"{shortened(name)} is no {what}: give a subclass of"
            f" notall.plugins.{base.__name__}"
        )
    values = [
        value
        for value, annotation in base.__annotations__.items()
        if "ClassVar" in str(annotation)
    ]
    missing = {value for value in values if not hasattr(found, value)}
    missing |= getattr(found, "__abstractmethods__", set())
    if missing:
        raise UsageError(
            f"{shortened(name)} lacks {', '.join(sorted(missing))}: give it what"
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
            package = f" of {point.dist.name}" if point.dist else ""
            description = f"{shortened(name)} ({shortened(point.value)}{package})"
            return _loaded(point.value, description)
    if ":" not in name:
        return None
    permitted = PERMITTED.get()
    file = permitted.check(name) if permitted else None
    folder = permitted.folder if permitted and permitted.folder else Path.cwd()
    with importing_from(folder):
        found = _loaded(name, shortened(name))
    if file and _source_file(name) != file.resolve():
        raise UsageError(
            f"{shortened(name)} is of another module than {shortened(file)}: rename"
            " that file"
        )
    _NAMED.add(name)
    return found


_NAMED = set[str]()  # each module:function that was found


def hash_of_source(name: str) -> dict[str, str]:
    """For a provenance: a hash of the file of `module:function`, which may change, once
    it is imported.
    """
    file = _source_file(name)
    return {"function_sha256": _sha256_of(file)} if file else {}


def functions_in(words: Sequence[str]) -> dict[str, str]:
    """Each imported `module:function` that a command names, with the SHA-256 of its
    file.
    """
    found: dict[str, str] = {}
    for name in sorted(_NAMED):
        file = _source_file(name)
        if file and any(word.endswith(name) for word in words):
            found[name] = _sha256_of(file)
    return found


@contextmanager
def importing_from(folder: Path) -> Iterator[None]:
    """Inside, Python looks for modules in a folder, too, behind all else: it hides no
    library.

    Its files run as they are written: bytecode next to them, which may be other code,
    is not read.
    """
    here = str(folder.absolute())
    is_new = here not in sys.path
    source = (_AsWritten, SOURCE_SUFFIXES)
    extensions = (ExtensionFileLoader, EXTENSION_SUFFIXES)
    finder = FileFinder.path_hook(source, extensions)

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
def explained_plugin(name: str) -> Iterator[None]:
    """Make one line of what code of others raises: what it was, and where in their
    code.
    """
    try:
        yield
    except (UsageError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # an exit would look like success
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


def _sha256_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _loaded(value: str, description: str) -> Any:
    """What stands behind `module:function`; `description` names it in messages."""
    match = EntryPoint.pattern.fullmatch(value)
    if not match or not match["attr"]:
        raise UsageError(
            f"{description} names nothing: write module:function, such as"
            " mine:score_size"
        )
    module = match["module"]
    found = _imported(module, description)
    _check_version(module, description)
    for name in match["attr"].split("."):
        if not hasattr(found, name):
            raise UsageError(
                f"there is no {description}: {module} has no {shortened(name)}"
                f"{_alternatives(found, name, module)}"
            )
        found = getattr(found, name)
    return found


def _imported(module: str, description: str) -> Any:
    try:
        return import_module(module)
    except (Exception, SystemExit) as error:  # their code may raise anything, and exit
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent and f"{module}.".startswith(f"{absent}."):
            raise UsageError(
                f"there is no {description}: no module is called"
                f" {shortened(absent)}; put its file into this folder, or install"
                " its package"
            ) from error
        raise UsageError(
            f"{description} fails as it is imported: {_where(error)}"
        ) from error


def _check_version(module: str, description: str) -> None:
    """Refuse a plug-in that is written for another version of the API.

    Its module says which, or the package that the module is in; one that says none is
    taken as it is.
    """
    for place in (module, module.partition(".")[0]):
        wanted = getattr(sys.modules[place], NAMED_VERSION, API_VERSION)
        if wanted != API_VERSION:
            is_newer = isinstance(wanted, int) and wanted > API_VERSION
            fix = "update notall" if is_newer else "update what it is in"
            raise UsageError(
                f"{description} is written for version {shortened(wanted)} of"
                f" notall.plugins, and this notall has version {API_VERSION}: {fix}"
            )


def _alternatives(holder: object, name: str, module: str) -> str:
    """What a module has in place of `name`: one like it, or the list of its own."""
    if near := nearest(name, dir(holder)):
        return near
    own = [
        key
        for key, value in vars(holder).items()
        if getattr(value, "__module__", None) == module
    ]
    return f"; it has {shortened(', '.join(own))}" if own else ""


def _where(error: BaseException) -> str:
    """What was raised, and in which line of theirs: not in notall's own, nor in an
    installed package.
    """
    message = shortened(f"{type(error).__name__}: {error}", 120)
    if isinstance(error, SyntaxError):  # which names the line
        return message
    ours = os.path.dirname(__file__)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<")
    ]
    theirs = [
        frame
        for frame in frames
        if not frame.filename.startswith(ours) and "site-packages" not in frame.filename
    ]
    last = (theirs or frames)[-1]
    return f"{message} ({os.path.basename(last.filename)}, line {last.lineno})"
