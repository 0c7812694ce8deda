"""Which commands there are, and how a function becomes one: its file is imported when
it is called.
"""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import UsageError, shortened
from ..experiments.waiting import SHOWN_BY
from ..options import AskedOption
from ..progress import Progress
from ..version import __version__
from .spread import spread

if TYPE_CHECKING:
    from ..experiments.verdict import Verdict
    from ..results.repairs import MeasuredRecord
    from ..results.table import Table

# How `notall --help` groups the commands.
ALL = "All of it in one command"
LOOK, CHOOSE, REPAIR = "Look at a model", "Choose what to skip", "Recover quality"
MEASURE, SHOW, TAKE = (
    "Measure what it costs and saves",
    "Show results",
    "Take the result elsewhere",
)

# In the order in which one comes to need them: the group, the file, and what the list
# of commands says.
COMMANDS = {
    "slim": (
        ALL,
        "slim",
        "Run search, repair, bench, export and card in one command.",
    ),
    "inspect": (
        LOOK,
        "look",
        "Show every sublayer: its parameters, weights, KV cache and state.",
    ),
    "similarity": (
        LOOK,
        "look",
        "Show how similar each layer's features are to the previous layer's.",
    ),
    "generate": (LOOK, "look", "Continue a prompt with the skipped model."),
    "compare": (CHOOSE, "choose", "Compare ways to choose on held-out text."),
    "search": (
        CHOOSE,
        "choose",
        "Choose what to skip, by the search or another importance criterion.",
    ),
    "plan": (CHOOSE, "choose", "Write the paper's plan, which skips the deepest."),
    "criteria": (CHOOSE, "choose", "List the importance criteria."),
    "repair": (
        REPAIR,
        "repair",
        "Refit the remaining weights, to recover a part of the loss.",
    ),
    "heal": (
        REPAIR,
        "repair",
        "Train the remaining weights for some minutes: recovery fine-tuning.",
    ),
    "bench": (
        MEASURE,
        "speed",
        "Time prefill and decode of the original and the pruned model.",
    ),
    "draft": (
        MEASURE,
        "speed",
        "Measure the speedup of a plan as a draft model in speculative decoding.",
    ),
    "eval": (
        MEASURE,
        "evaluate",
        "Measure what a plan costs on a text, and on benchmarks if you name some.",
    ),
    "paper": (
        MEASURE,
        "grid",
        "Run the paper's evaluation, and check each of its claims.",
    ),
    "pareto": (
        MEASURE,
        "pareto",
        "Compare skipping with quantising in the engine that serves the model.",
    ),
    "sweep": (MEASURE, "grid", "Run the paper's grid on a text."),
    "tasks": (
        MEASURE,
        "results",
        "List the tasks of lm-evaluation-harness that --tasks takes.",
    ),
    "report": (
        SHOW,
        "results",
        "Turn a results folder into one page that opens anywhere.",
    ),
    "reproduce": (
        SHOW,
        "results",
        "Make a results folder again, and compare every figure.",
    ),
    "export": (
        TAKE,
        "export",
        "Write the model without what the plan skips, as files that engines load.",
    ),
    "card": (
        TAKE,
        "card",
        "Put results of an export onto its model card.",
    ),
    "recipe": (
        TAKE,
        "recipe",
        "Write a plan of whole blocks as a recipe of mergekit.",
    ),
}

# What Typer raises over words that it cannot read; its releases keep the class in
# different places.
MISTYPED: type[Exception] = typer.BadParameter.__bases__[0]
# the exit code of a command that did its work and did not reach what was asked for, or
# recorded
MISSED = 3
# words of commands that need no model
WITHOUT_MODEL = {"card", "criteria", "report", "tasks", "--help", "-h"}

FIRST_STEPS = """\
notall removes sublayers of a language model, and measures the loss and the
gain.

  Your model  notall search MODEL --recovery 0.95 --tasks passkey,answers
              find what you can remove without losing task scores
  Look        notall report plan.search -o report.html
  The paper   notall sweep --out results
  All else    notall --help
"""


class Interrupted(BaseException):
    """Ctrl-C, under a name that Typer lets pass: of a KeyboardInterrupt it makes an
    exit without a word.
    """


class Listed(TyperCommand):
    """A command of the list, whose file is imported once it is needed."""

    def loaded(self) -> Any:
        """The command itself, as Typer parses it."""
        import_module(f".{COMMANDS[str(self.name)][1]}", __package__)
        return typer.main.get_command(_LOADED[str(self.name)])

    def make_context(self, *given: Any, **how: Any) -> Any:
        """That of the command itself."""
        return self.loaded().make_context(*given, **how)


class Tour(TyperGroup):
    """Lists the commands in their order, and imports one when it is called."""

    def __init__(self, **given: Any) -> None:
        listed = {
            name: Listed(
                name, help=summary, rich_help_panel=panel, rich_markup_mode="rich"
            )
            for name, (panel, _, summary) in COMMANDS.items()
        }
        super().__init__(**given | {"commands": listed})

    def invoke(self, context: Any) -> Any:
        """Run a command; Ctrl-C leaves as `Interrupted`."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            raise Interrupted from None


class OnRay(TyperCommand):
    """A command whose `--ray` may stand without an address, which Typer's options
    cannot: that is `--ray any`.
    """

    def parse_args(self, context: Any, words: list[str]) -> list[str]:
        """Read `--ray` without an address as `--ray any`."""
        alone = (
            word == "--ray" and after.startswith("-")
            for word, after in zip(words, [*words[1:], "-"])
        )
        spelt = [
            one
            for word, bare in zip(words, alone)
            for one in ([word, "any"] if bare else [word])
        ]
        return super().parse_args(context, spelt)


app = typer.Typer(
    name="notall",
    cls=Tour,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "Exit codes: 0 done; 2 bad input, named in one line with the fix; 3 done, but"
        " the budget was missed, or a figure differs; 130 interrupted. NO_COLOR=1 turns"
        " colours off; --json prints any table as JSON."
    ),
)
# by the names of COMMANDS, once their files are imported
_LOADED: dict[str, typer.Typer] = {}


def options_in(words: Sequence[str]) -> list[AskedOption]:
    """What the words of a command ask for, as its own parser reads them.

    Raises `UsageError` where it cannot.
    """
    name, *rest = words
    parsed = Listed(name).loaded()
    context = parsed.context_class(parsed, info_name=name)
    try:
        values, others, order = parsed.make_parser(context).parse_args([*rest])
    except MISTYPED as error:
        message: str = error.format_message()  # type: ignore[attr-defined]
        raise UsageError(shortened(message, 200)) from None
    if others:
        raise UsageError(f"notall {name} takes no {shortened(others[0])}")
    found = list[AskedOption]()
    for one in dict.fromkeys(order):
        is_argument = one.param_type_name == "argument"
        flag = "" if is_argument else one.opts[0]
        value = values[one.name]
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str):
                found.append(AskedOption(one.name, flag, each))
            elif not is_argument:  # an absent one has no value, and a flag none
                found.append(AskedOption(one.name, flag, None))
    return sorted(found, key=lambda one: one.flag != "")


def command(
    *, example: str, name: str = ""
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function whose parameters are options, or dataclasses of
    them.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        called = name or function.__name__
        alone = typer.Typer(
            add_completion=False,
            rich_markup_mode="rich",
            pretty_exceptions_enable=False,
        )
        add_to = alone.command(
            name=called,
            cls=OnRay,
            rich_help_panel=COMMANDS[called][0],
            epilog=f"Example:  {example}",
            help=_unbroken(function.__doc__ or ""),
        )
        add_to(spread(function))
        _LOADED[called] = alone
        return function

    return add


def _unbroken(text: str) -> str:
    """Each paragraph in a line: it is broken where the terminal ends."""
    return "\n\n".join(" ".join(one.split()) for one in text.split("\n\n")).strip()


@app.callback(invoke_without_command=True)
def notall(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="print the version")
    ] = False,
) -> None:
    """Remove attentions, MLPs or whole blocks of a language model, without training.

    Find what you can remove without losing task scores:  [bold]notall search MODEL --recovery 0.95
    --tasks passkey,answers[/bold]
    """
    show_work()
    if version:
        typer.echo(f"notall {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(FIRST_STEPS, nl=False)
    elif sys.stderr.isatty() and not WITHOUT_MODEL.intersection(sys.argv):
        from ..results.terminal import progress_bar

        with progress_bar("starting torch and transformers"):  # which takes seconds
            import transformers  # noqa: F401


def warn(measured: "Sequence[MeasuredRecord]") -> None:
    """Print a warning on stderr for each text that a repair has made worse."""
    from ..experiments.evaluate import repair_warnings

    for warning in repair_warnings(measured):
        print(f"warning: {warning}", file=sys.stderr)


class OnStderr(logging.Handler):
    """Prints what the package logs, word for word, on what is stderr at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message of a record."""
        print(record.getMessage(), file=sys.stderr)


ON_STDERR = OnStderr()


def show_work() -> None:
    """Show notes of the package on stderr, and bars where it loads or reads."""
    logger = logging.getLogger("notall.experiments")
    logger.addHandler(ON_STDERR)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    SHOWN_BY.set(_bar)


def _bar(doing: str) -> AbstractContextManager[Progress]:
    from ..results.terminal import progress_bar

    return progress_bar(doing)


def conclude(
    verdict: "Verdict",
    tables: "Mapping[str, Table] | None" = None,
    measured: "Sequence[MeasuredRecord]" = (),
    *,
    also: "Mapping[str, Verdict] | None" = None,
    as_json: bool,
) -> None:
    """Show tables, and verdicts on a plan and on others by name. Leave with
    `MISSED` where a budget was missed.
    """
    from ..results.terminal import say, show

    if tables:
        others = {
            f"verdict_{name}": one.in_numbers() for name, one in (also or {}).items()
        }
        show(tables, as_json=as_json, also={"verdict": verdict.in_numbers(), **others})
    warn(measured)
    verdicts = [verdict, *(also or {}).values()]
    for one in verdicts:
        if not as_json:
            for line in one.lines():
                say(line)
        elif one.missed:
            print(f"missed {one.missed}", file=sys.stderr)
    if any(one.missed for one in verdicts):
        raise typer.Exit(MISSED)
