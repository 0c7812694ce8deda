"""Options: fields of dataclasses that Python and, by `notall.cli.spread`, the command
line share.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    ClassVar,
    Concatenate,
    NamedTuple,
    ParamSpec,
    TypeVar,
)

from .errors import UsageError
from .progress import DECODED_ALONE, generation_work, reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel


P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """How a parameter is called and explained at the command line; by default by its
    own name.
    """

    help: str
    flags: tuple[
        str, ...
    ] = ()  # other names; the first that begins with two dashes is the main one
    metavar: str | None = None
    panel: str | None = None
    argument: bool = False  # whether it is given by its place
    least: int | None = None
    most: int | None = None


def _as_field(make: Callable[P, Option]) -> Callable[Concatenate[T, P], T]:
    def option(default: T, /, *given: P.args, **how: P.kwargs) -> T:
        return field(default=default, metadata={"option": make(*given, **how)})

    return option


option = _as_field(
    Option
)  # of a dataclass a field with this default, whose `Option` is made of what follows


class AskedOption(NamedTuple):
    """An option of a command: field, flag ("" of an argument), value (None of a flag
    alone).
    """

    name: str
    flag: str
    value: str | None

    @property
    def words(self) -> list[str]:
        """As it is typed."""
        if self.value is None:
            return [self.flag]
        if self.flag and self.value.startswith("-"):
            return [f"{self.flag}={self.value}"]
        return [self.flag, self.value] if self.flag else [self.value]

    @property
    def is_ambiguous(self) -> bool:
        """Whether it is an argument that would be read as a flag."""
        return not self.flag and str(self.value).startswith("-")


Json = Annotated[bool, Option("print JSON instead of a table", ("--json",))]
Seed = Annotated[
    int, Option("random seed", least=0, most=(1 << 32) - 1)
]  # as numpy takes them too
OutFolder = Annotated[Path, Option("folder for the results", ("--out", "-o"))]
KeepIn = Annotated[
    Path | None,
    Option(
        "keep the results in this folder, for `notall report`", ("--out", "-o"), "DIR"
    ),
]


def check_sizes(sequences: int, length: int = 2, batch_size: int = 1) -> None:
    """Raise `UsageError` for numbers that make no batch."""
    if sequences < 1 or length < 2 or batch_size < 1:
        problem = f"sequences is {sequences}, length {length}, batch {batch_size}"
        raise UsageError(f"{problem}: give at least 1, 2 and 1")


@dataclass(frozen=True)
class RunOptions:
    """How any run is seeded, and how it prints."""

    seed: Seed = 0
    as_json: Json = False


@dataclass(frozen=True)
class Workload:
    """What is timed, in rounds of all models in turn: a prompt and greedy steps behind
    it, for sequences at once.
    """

    PANEL: ClassVar[str] = "Timing"

    prompt_tokens: int = option(128, "tokens of the prompt")
    generation_tokens: int = option(16, "tokens generated behind it")
    concurrency: int = option(1, "sequences at once")
    rounds: int = option(5, "timed rounds; each times all models in turn")

    @property
    def steps(self) -> int:
        """How long all rounds of one model take, the first one included, in tokens that
        are read.
        """
        each = reading(self.prompt_tokens) + generation_work(self.generation_tokens)
        return round(DECODED_ALONE * (self.rounds + 1) * self.concurrency * each)

    def check(self, model: "PreTrainedModel") -> None:
        """Raise `UsageError` for counts that are too low, and for more tokens than the
        model has positions.
        """
        for name, count in vars(self).items():
            if count < 1:
                raise UsageError(f"{name} is {count}; give 1 or more")
        from .running.generating import check_positions

        check_positions(model, self.prompt_tokens, self.generation_tokens)


WORKLOAD = Workload()


@dataclass(frozen=True)
class GridOptions:
    """Which shares of the layers the paper's grid skips (2407.15516, section 3)."""

    PANEL: ClassVar[str] = "Grid"

    fractions: tuple[float, ...] = option(
        (0.10, 0.25, 0.33),
        "share of the layers to skip, from 0 to 1; repeat it for more",
        ("--fraction",),
    )

    def check(self) -> None:
        """Raise `UsageError` where there is none, or one that is no share."""
        if not self.fractions:
            raise UsageError("the grid has no fraction: give one or more from 0 to 1")
        for one in self.fractions:
            if not 0 < one <= 1:
                raise UsageError(
                    f"fraction {one:g} skips nothing, or more than there is: give more"
                    " than 0 and at most 1, such as 0.33"
                )


PAPER_GRID = GridOptions()
