"""Options of the command line from dataclasses: each field is one, and the command gets the dataclass back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import wraps
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from ..errors import shortened
from ..options import Option


@dataclass(frozen=True)
class _Field:
    """A field of an option dataclass, or a parameter of a command, as Typer takes it."""

    owner: str  # the command's parameter that it belongs to
    name: str
    parameter: inspect.Parameter
    values: type[Enum] | None  # where a choice of words is made an enumeration, as Typer wants it


def spread(function: Callable[..., None]) -> Callable[..., None]:
    """`function` with a parameter for each field of its parameters that are dataclasses.

    A parameter's default is an instance, whose values are the options' defaults here; one that is `...` is required.
    """
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters
    found = [field for name, one in parameters.items() for field in _fields_of(name, one, hints[name])]
    classes = {name: hints[name] for name in parameters if is_dataclass(hints[name])}
    by_name = {field.parameter.name: field for field in found}
    assert len(by_name) == len(found), f"two options of {function.__name__} have one name"

    @wraps(function)
    def command(**given: Any) -> None:
        plain = {name: _plain(by_name[name], value) for name, value in given.items()}
        mine: dict[str, dict[str, Any]] = {name: {} for name in classes}
        own: dict[str, Any] = {}
        for name, value in plain.items():
            field = by_name[name]
            (mine[field.owner] if field.owner in classes else own)[field.name] = value
        function(**own, **{name: kind(**mine[name]) for name, kind in classes.items()})

    command.__signature__ = inspect.Signature([field.parameter for field in found])  # type: ignore[attr-defined]
    command.__annotations__ = {field.parameter.name: field.parameter.annotation for field in found}
    return command


def _fields_of(name: str, parameter: inspect.Parameter, hint: Any) -> Iterator[_Field]:
    if not is_dataclass(hint):
        yield _made(name, name, hint, parameter.default, None)
        return
    instance = parameter.default
    panel = getattr(hint, "PANEL", None)
    hints = get_type_hints(hint, include_extras=True)
    for field in fields(hint):
        default = getattr(instance, field.name) if instance is not inspect.Parameter.empty else _default_of(field)
        yield _made(name, field.name, hints[field.name], default, panel)


def _default_of(field: Any) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is MISSING else field.default


def _made(owner: str, name: str, hint: Any, default: Any, panel: str | None) -> _Field:
    kind, *more = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    option = next((one for one in more if isinstance(one, Option)), None)
    assert option, f"{owner}.{name} has no Option to explain it"
    required = default in (inspect.Parameter.empty, ...)
    values, kind = _as_enumeration(name, kind)
    if values and default is not None and not required:
        default = values(default)
    if isinstance(default, tuple):
        default = list(default)
    flags = option.flags or (f"--{name.replace('_', '-')}",)
    told: dict[str, Any] = {"help": option.help, "metavar": option.metavar}
    if option.argument:
        info = typer.Argument(**told)
    else:
        shown: Any = True if option.shown is None else option.shown
        told |= {"min": option.least, "rich_help_panel": option.panel or panel, "callback": _at_most(option.most)}
        info = typer.Option(*flags, **told, show_default=shown)
    parameter = inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else default,
        annotation=Annotated[kind, info],
    )
    return _Field(owner, name, parameter, values)


def _at_most(most: int | None) -> Callable[[int], int] | None:
    """What refuses larger numbers: a `max` of Typer's would fill the help with digits."""
    if most is None:
        return None

    def check(value: int) -> int:
        if value > most:
            raise typer.BadParameter(f"{shortened(value)} is more than {most}")
        return value

    return check


def _as_enumeration(name: str, kind: Any) -> tuple[type[Enum] | None, Any]:
    """A `Literal` as an enumeration of its words, and a tuple as a list: what Typer knows."""
    if get_origin(kind) is tuple:
        return None, list[get_args(kind)[0]]  # type: ignore[misc]
    if get_origin(kind) is Literal:
        words = {word.replace("-", "_"): word for word in get_args(kind)}
        made: Any = Enum(name, words, type=str)  # type: ignore[misc]
        return made, made
    inner = next((one for one in get_args(kind) if get_origin(one) is Literal), None)
    if inner is None:
        return None, kind
    values, words = _as_enumeration(name, inner)  # Literal[...] | None
    return values, words | None


def _plain(field: _Field, value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return tuple(value) if isinstance(value, list) else value
