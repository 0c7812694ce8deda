"""The command that all commands are added to."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .. import __version__
from ..results.progress_bars import working
from .spread import spread

# How `notall --help` groups the commands, in this order.
PANELS = LOOK, CHOOSE, REPAIR, MEASURE, SHOW, TAKE = (
    "Look at a model",
    "Choose what to skip",
    "Make up for what is skipped",
    "Measure what it costs and saves",
    "Show what was measured",
    "Take the result elsewhere",
)

MISSED = 3  # the exit code of a command that did its work and did not reach what was asked for
WITHOUT_MODEL = {"criteria", "report", "tasks", "--help", "-h"}  # words of commands that need no model

FIRST_STEPS = """\
notall leaves out what a language model does not need, and measures what that
costs and saves.

  First run   notall sweep --out results             the paper's grid: minutes
  Look        notall report results -o report.html   one page, for a browser
  Your model  notall sweep MODEL --out results       a hub id, a folder, a .gguf
  All else    notall --help                          every command
"""


def _place(command: Any) -> int:
    panel = getattr(command, "rich_help_panel", None)
    return PANELS.index(panel) if panel in PANELS else len(PANELS)


class Interrupted(BaseException):
    """Ctrl-C, under a name that Typer lets pass: of a KeyboardInterrupt it makes an exit without a word."""


class Tour(TyperGroup):
    """Lists the commands in the order in which one comes to need them."""

    def invoke(self, context: Any) -> Any:
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            raise Interrupted from None

    def list_commands(self, context: Any) -> list[str]:
        return sorted(self.commands, key=lambda name: _place(self.commands[name]))


class OnRay(TyperCommand):
    """A command whose `--ray` may stand without an address, which typer's options cannot."""

    def parse_args(self, context: Any, words: list[str]) -> list[str]:
        return super().parse_args(context, _with_address(words))


def _with_address(words: list[str]) -> list[str]:
    """`--ray` alone as `--ray any`."""
    alone = (word == "--ray" and after.startswith("-") for word, after in zip(words, [*words[1:], "-"]))
    return [added for word, bare in zip(words, alone) for added in ([word, "any"] if bare else [word])]


app = typer.Typer(
    name="notall",
    cls=Tour,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done; 2 bad input, named in one line with the fix; 3 done, but the budget was missed; "
    "130 interrupted. "
    "NO_COLOR=1 turns colours off; --json prints any table as JSON.",
)


def command(
    panel: str, *, example: str, name: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function whose parameters are options, or dataclasses of them, as a command."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        app.command(name=name, cls=OnRay, rich_help_panel=panel, epilog=f"Example:  {example}")(spread(function))
        return function

    return add


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"notall {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def notall(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Leave out what a language model does not need: attentions, MLPs or whole blocks, without training.

    First run:  [bold]notall sweep --out results[/bold], then [bold]notall report results -o report.html[/bold]
    """
    if context.invoked_subcommand is None:
        typer.echo(FIRST_STEPS, nl=False)
    elif sys.stderr.isatty() and not WITHOUT_MODEL.intersection(sys.argv):
        _import_models()


def _import_models() -> None:
    """Import what each command that has a model needs, and show that: it takes seconds."""
    with working("starting torch and transformers"):
        import transformers  # noqa: F401
