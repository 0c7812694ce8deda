"""Options of the command line from dataclasses: each field is one, and the command gets
the dataclass back.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from ..errors import shortened
from ..options import Option

REQUIRED = Parameter.empty


def spread(function: Callable[..., None]) -> Callable[..., None]:
    """`function` with a parameter for each field of its parameters that are
    dataclasses; `...` is a required one.
    """
    # get_type_hints of Python 3.10 hides the Option of a parameter that is None
    given = signature(function, eval_str=True).parameters
    hints = {name: parameter.annotation for name, parameter in given.items()}
    classes: dict[str, Any] = {
        name: hint for name, hint in hints.items() if is_dataclass(hint)
    }
    options: dict[str, Parameter] = {}
    owners: dict[str, str] = {}  # of an option, the parameter of which it is a field
    for name, parameter in given.items():
        how = hints[name], parameter.default
        for option in _fields(*how) if name in classes else [_option(name, *how)]:
            assert option.name not in options, (
                f"two options of {function.__name__} are called {option.name}"
            )
            options[option.name], owners[option.name] = option, name

    @wraps(function)
    def command(**values: Any) -> None:
        by_owner: dict[str, dict[str, Any]] = {name: {} for name in given}
        for name, value in values.items():
            fixed = tuple(value) if isinstance(value, list) else value
            by_owner[owners[name]][name] = fixed
        arguments = {
            name: classes[name](**own) if name in classes else own[name]
            for name, own in by_owner.items()
        }
        function(**arguments)

    command.__signature__ = Signature([*options.values()])  # type: ignore[attr-defined]
    command.__annotations__ = {
        name: option.annotation for name, option in options.items()
    }
    return command


def _fields(kind: Any, given: Any) -> Iterator[Parameter]:
    """Of a dataclass, with the defaults of `given`, an instance, where there is one."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        default = field.default if given is REQUIRED else getattr(given, field.name)
        panel = getattr(kind, "PANEL", None)
        yield _option(
            field.name, hints[field.name], default, panel, field.metadata.get("option")
        )


def _option(
    name: str,
    hint: Any,
    default: Any,
    panel: str | None = None,
    option: Option | None = None,
) -> Parameter:
    """As Typer takes it, which knows lists and no tuples."""
    kind, *more = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    option = option or next((one for one in more if isinstance(one, Option)), None)
    assert option, f"{name} has no Option to explain it"
    words: dict[str, Any] = {"help": option.help, "metavar": option.metavar}
    if option.argument:
        info = typer.Argument(**words)
    else:
        info = typer.Option(
            *(option.flags or (f"--{name.replace('_', '-')}",)),
            **words,
            min=option.least,
            callback=_at_most(option.most),
            rich_help_panel=option.panel or panel,
        )
    if get_origin(kind) is tuple:
        kind = list[get_args(kind)[0]]  # type: ignore[misc]
    if default is ...:
        default = REQUIRED
    elif isinstance(default, tuple):
        default = list(default)
    return Parameter(
        name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def _at_most(most: int | None) -> Callable[[int], int] | None:
    """What refuses larger numbers: a `max` of Typer's would fill the help with
    digits.
    """

    def check(value: int) -> int:
        if most is not None and value > most:
            raise typer.BadParameter(f"{shortened(value)} is more than {most}")
        return value

    return None if most is None else check
