"""What is skipped: a plan file, or so many of a kind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ...errors import UsageError, nearest, shortened
from ...exporters.manifest import dense_of, exported_plan, weights_beside
from ...integrity import MANIFEST
from ...options import Option, option
from ...plan import PUBLISHED_AS, Phase, Plan, several

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...choosing.space import Space


DEFAULT_SHARE = 0.33  # of the layers, by default: the paper's most
NUMBER_PATTERN = r"[0-9]{1,9}(\.[0-9]{1,9})?|\.[0-9]{1,9}"


def read_plan(path: Path) -> Plan:
    """The plan of a file, an export, or the folder of a repair, with its weights.

    Raises `UsageError` as their readers do.
    """
    if str(path).startswith(PUBLISHED_AS):  # whatever lies in the working folder
        return Plan.load(path)
    try:
        is_export, is_folder = (path / MANIFEST).is_file(), path.is_dir()
    except OSError as error:  # a name that is too long
        raise UsageError(
            f"cannot read the plan {shortened(path)}: {error.strerror}; give another"
            " name"
        ) from None
    if is_export:
        return exported_plan(path)
    if is_folder:
        from ...running.repaired import RepairedPlan

        return RepairedPlan.load(path)
    return Plan.load(path)


def read_plans(paths: Sequence[Path]) -> dict[str, Plan]:
    """Plans by the names of their files. Raises `UsageError` for two of one name."""
    names = [
        path.name.removeprefix("published:").removesuffix(".json") for path in paths
    ]
    if len(set(names)) < len(names):
        raise UsageError("two of the plans have the same name: rename one")
    return dict(zip(names, map(read_plan, paths)))


KeepFirst = Annotated[bool, Option("preserve the first layer")]
KeepLast = Annotated[bool, Option("preserve the last layer")]
PHASE = (
    "skip for all tokens, or for a prompt's alone, whose keys and values are kept"
    " (prefill)"
)
LAST_TOKENS_HELP = "with --phase prefill: how many last tokens of a prompt run whole"


@dataclass(frozen=True)
class PlanOptions:
    """What is left out: the plan of a file, or the deepest of a kind."""

    plan: Path | None = option(None, "plan file, folder of a repair, or published:NAME")
    skip: str | None = option(
        None,
        "instead of --plan: the deepest, such as attention:0.33",
        (),
        "KIND[:HOW MANY]",
    )
    keep_last: bool = option(False, "with --skip: preserve the last layer")
    phase: Phase = option("all", PHASE)
    last_tokens: int = option(1, LAST_TOKENS_HELP, least=1)

    @property
    def amount(self) -> SkipAmount | None:
        """The kind and number of --skip; None without it."""
        return SkipAmount.parse(self.skip, DEFAULT_SHARE) if self.skip else None

    @cached_property
    def named(self) -> Plan:
        """The plan of a file; one of nothing where there is none."""
        return read_plan(self.plan) if self.plan else Plan()

    @property
    def words(self) -> dict[str, object]:
        """The options again, for a command to type next."""
        if not self.skip:
            return {"plan": self.plan}
        words: dict[str, object] = {
            "skip": self.amount,
            "keep_last": self.keep_last or None,
        }
        if self.phase != "all":
            words |= {"phase": self.phase, "last_tokens": self.last_tokens}
        return words

    def check(self, *, needed: bool = False, model: str = "") -> None:
        """Raise `UsageError` for two plans, or too little for what is
        `needed` of `model`.
        """
        if self.plan and self.skip:
            raise UsageError(
                "--plan and --skip both say what to leave out: give one of them"
            )
        if self.keep_last and not self.skip:
            raise UsageError(
                "--keep-last says which of what is left out: add --skip attention, mlp"
                " or block"
            )
        if self.phase != "all" and not self.skip:
            raise UsageError(
                f"--phase {self.phase} says how --skip leaves out: add --skip block:8,"
                " or drop it"
            )
        if self.last_tokens != 1 and self.phase != "prefill":
            raise UsageError(
                "--last-tokens says how much of a prompt runs whole: add --phase"
                " prefill"
            )
        if needed and not (self.plan or self.skip):
            if model and (Path(model) / MANIFEST).is_file():
                plan = shortened(weights_beside(Path(model)) or model)
                raise UsageError(
                    f"{shortened(model)} is what is left of another model: name that"
                    f" one, such as {dense_of(Path(model))}, and give --plan {plan}"
                )
            raise UsageError(
                "say what to leave out: --plan plan.json (of notall search), or --skip"
                " attention:0.25"
            )
        _ = self.amount, self.named

    def of(self, model: PreTrainedModel) -> Plan:
        """The plan that was read, or by the paper's rule the deepest of a kind. Raises
        as `deepest` does.
        """
        from ...choosing.criteria.data_free import SKIPPABLE, deepest
        from ...structure.locating import locate

        skip = self.amount
        if skip is None:
            return self.named
        structure = locate(model)
        amount, *more = skip.amounts
        chosen = {"portable", "sublayer", "period", *structure.mixers}
        if skip.kind in chosen.difference(SKIPPABLE):
            raise UsageError(
                f"--skip {skip} has no deepest: choose a set with `notall search --skip"
                f" {skip}`"
            )
        if more:
            raise UsageError(f"--skip {skip} asks for several plans: give one number")
        if amount >= 1 and amount % 1:
            raise UsageError(
                f"--skip {skip} is no number of layers: give a whole one, or a share"
                " below 1"
            )
        share, count = (amount, None) if amount < 1 else (None, int(amount))
        how = {
            "keep_last": self.keep_last,
            "phase": self.phase,
            "last_tokens": self.last_tokens,
        }
        found = deepest(structure, skip.kind, share, count=count, **how)  # type: ignore[arg-type]
        if amount and not found:
            raise UsageError(
                f"{amount:g} of {several(len(structure.blocks), 'layer')} is none of"
                " them: give a larger number"
            )
        return found


@dataclass(frozen=True)
class SkipAmount:
    """A kind of sublayers and how many of them, such as `attention:8`: below 1 a share,
    several with commas between.
    """

    kind: str
    amounts: tuple[float, ...]

    @classmethod
    def parse(cls, text: str, *otherwise: float) -> SkipAmount:
        """Raises `UsageError` for what is no number; where none is given, it is
        `otherwise`.
        """
        kind, colon, amounts = text.partition(":")
        numbers = amounts.split(",") if colon else []
        if not kind or not all(re.fullmatch(NUMBER_PATTERN, word) for word in numbers):
            raise UsageError(
                f"--skip {shortened(text)} is no kind and number: write attention:8, or"
                " attention:0.33"
            )
        return cls(kind, tuple(map(float, numbers)) or otherwise)

    def __str__(self) -> str:
        amounts = ",".join(f"{amount:g}" for amount in self.amounts)
        return f"{self.kind}:{amounts}" if amounts else self.kind


def space_of(
    model: PreTrainedModel,
    kind: str,
    keep_first: bool = False,
    keep_last: bool = False,
    phase: Phase = "all",
    last_tokens: int = 1,
) -> Space:
    """What is chosen among: `portable` is any sublayers whose absence leaves an
    ordinary checkpoint.
    """
    from ...choosing.space import UNIT_KINDS, Space
    from ...structure.locating import locate

    structure, portable = locate(model), kind == "portable"
    names = [*UNIT_KINDS, *structure.mixers, "portable"]
    if kind not in names:
        near = nearest(kind, names)
        raise UsageError(
            f"--skip {shortened(kind)!r}{near} is nothing to choose among: give one of"
            f" {', '.join(names)}"
        )
    among = "sublayer" if portable else kind
    return Space(
        structure, among, portable, int(keep_first), int(keep_last), phase, last_tokens
    )
