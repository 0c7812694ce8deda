"""What is chosen among, for which budget, and by what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ...choosing.search_config import SearchConfig
from ...errors import UsageError
from ...extras import need
from ...models.names import USAGE_MIX
from ...options import Workload, option
from ...plan import Phase
from ...progress import Progress, silent
from ..options.plan import (
    LAST_TOKENS_HELP,
    PHASE,
    KeepFirst,
    KeepLast,
    SkipAmount,
    space_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...choosing.budget import Budget, Resource
    from ...choosing.space import Space


FARTHEST = 0.3  # nats up to which a plan is looked for that keeps a recovery
# an episode has few tokens to judge, each of which is lost at once
WITH_RETRIEVAL = "kl + 0.3*retrieval"


RESOURCES: Mapping[str, Resource] = {
    "params": "params",
    "weights": "weight_bytes",
    "kv": "kv_bytes_per_token",
}


@dataclass(frozen=True)
class SpaceOptions:
    """What is chosen among, and in which phase it is skipped."""

    skip: str = option(
        "sublayer",
        "what to choose among, and how many of it, or below 1 what share: attention,"
        " mlp, block, sublayer (attentions and MLPs), or a kind of mixer, as inspect"
        " names it; portable: sublayers whose absence leaves an ordinary checkpoint;"
        " period: blocks until the kinds of mixers come again",
        metavar="KIND[:HOW MANY]",
    )
    keep_first: KeepFirst = False
    keep_last: KeepLast = False
    phase: Phase | None = option(
        None, f"{PHASE} (default: all; of a search by --recovery alone both)"
    )
    last_tokens: int | None = option(
        None,
        f"{LAST_TOKENS_HELP} (default: 64, or a quarter of the prompts that are scored"
        " and timed, if that is less)",
        least=1,
    )

    @property
    def amount(self) -> SkipAmount:
        """The kind and how many of --skip."""
        return SkipAmount.parse(self.skip)

    def of(self, model: PreTrainedModel) -> Space:
        """The space of a model. Raises as `space_of` does."""
        phase, last_tokens = self.phase or "all", self.last_tokens or 1
        return space_of(
            model, self.amount.kind, self.keep_first, self.keep_last, phase, last_tokens
        )


@dataclass(frozen=True)
class BudgetOptions:
    """How much is to be saved, or at most how many nats to lose."""

    PANEL: ClassVar[str] = (
        "Budget: HOW MANY of --skip, one of these or --recovery, or one with a limit of"
        " nats"
    )

    params: float | None = option(
        None, "save this many parameters, or this share of them if below 1"
    )
    weights: float | None = option(
        None, "save this many bytes of weights, or this share"
    )
    kv: float | None = option(
        None, "save this many bytes of KV cache per token, or this share"
    )
    speedup: float | None = option(
        None,
        "run prompt and generated tokens this many times as fast here, or with --phase"
        " prefill the prompt",
    )
    max_nll: float | None = option(
        None, "most NLL to add, in nats per token, alone or as a limit"
    )
    max_kl: float | None = option(None, "the same for KL")

    def check(self, amount: SkipAmount, recovery: float | None = None) -> BudgetChoice:
        """Raises `UsageError` unless these and the number of --skip are one budget, or
        none with a `recovery`.
        """
        from ...choosing.budget import check_nats
        from ...choosing.latency import check_faster

        if len(amount.amounts) > 1:
            raise UsageError(
                f"--skip {amount} asks for several budgets: give one number"
            )
        given: dict[str, float] = {
            name: value for name, value in vars(self).items() if value is not None
        }
        if amount.amounts:
            given["count"] = amount.amounts[0]
        limits = [one for one in given.items() if one[0].startswith("max_")]
        savings = [one for one in given.items() if one not in limits]
        if recovery and not given:
            return BudgetChoice(None, ("farthest", FARTHEST))
        if not given:
            options = self._options(["count", *vars(self)], amount)
            raise UsageError(
                f"give one budget: {' or '.join([*options, '--recovery'])}"
            )
        for several in (savings, limits):
            if len(several) > 1:
                options = self._options([*dict(several)], amount)
                raise UsageError(f"give one budget: {' or '.join(options)}")
        for _, value in limits:
            check_nats(value)
        if self.speedup is not None:
            check_faster(self.speedup)
        return BudgetChoice(next(iter(savings), None), next(iter(limits), None))

    @staticmethod
    def _options(names: Sequence[str], amount: SkipAmount) -> list[str]:
        """Budgets as they are typed."""
        options = {name: f"--{name.replace('_', '-')}" for name in names}
        if "count" in options:
            options["count"] = f"--skip {amount.kind}:N"
        return [*options.values()]


@dataclass(frozen=True)
class BudgetChoice:
    """What to save, or at most how many nats to lose, by the names of options."""

    saving: tuple[str, float] | None
    limit: tuple[str, float] | None = None

    @property
    def is_timed(self) -> bool:
        """Whether a time is to be saved."""
        return self.saving is not None and self.saving[0] == "speedup"

    def objective(self, text: str) -> str:
        """The one that is limited, else KL, which tells more of as much text; on the
        mix retrieval counts, too.
        """
        if self.limit and self.limit[0] in ("max_nll", "max_kl"):
            return self.limit[0].removeprefix("max_")
        return WITH_RETRIEVAL if text == USAGE_MIX else "kl"

    def check(self, model: PreTrainedModel, space: Space, workload: Workload) -> None:
        """Raise `UsageError` for what cannot be saved, as far as that is known without
        timing the model.
        """
        if self.is_timed:
            workload.check(model)
        else:
            self.of(model, space, workload)

    def of(
        self,
        model: PreTrainedModel,
        space: Space,
        workload: Workload,
        progress: Progress = silent,
    ) -> Budget:
        """The budget; where it is a speedup, the model is timed."""
        from ...choosing.budget import by_count, by_footprint, by_limit, within_limit
        from ...choosing.latency import by_speedup, measure_times

        limit = None
        if self.limit:
            name, nats = self.limit
            measures = {"max_nll": "NLL", "max_kl": "KL"}
            limit = by_limit(space, nats, measures.get(name, "of the objective"))
        if self.saving is None:
            assert limit
            return limit
        name, amount = self.saving
        if name == "count":
            saving = by_count(space, amount)
        elif name == "speedup":
            times = measure_times(
                model,
                workload,
                phase=space.phase,
                wanted=(space, amount),
                progress=progress,
            )
            saving = by_speedup(space, times, amount)
        else:
            saving = by_footprint(model, space, RESOURCES[name], amount)
        return within_limit(saving, limit) if limit else saving


@dataclass(frozen=True)
class ObjectiveOptions:
    """By which importance criterion sets are chosen, what they are judged by, and when
    to stop.
    """

    PANEL: ClassVar[str] = "What a set is judged by, and when to stop"

    criterion: str = option(
        "search", "a name of `notall criteria`, or your own module:function"
    )
    objective: str | None = option(
        None,
        "nll, kl, retrieval, answers, task:NAME, or a sum such as 'kl + 0.5*task:NAME'"
        " (default: kl, on the mix kl + 0.3*retrieval; what --max-nll or --max-kl"
        " limits)",
    )
    prompts: Path | None = option(
        None, "for `answers`: prompts, one per line, or a .jsonl with a `prompt` column"
    )
    max_minutes: float | None = option(
        SearchConfig.max_minutes,
        "minutes by the clock to look for at most; loading, writing the mix, timing and"
        " measuring take more",
    )
    patience: int = option(
        SearchConfig.patience,
        "stop after this many evaluations that bring nothing",
        least=0,
    )

    def check(self) -> None:
        """Raise `UsageError` for what is no criterion, or needs an extra that is not
        installed, and for a time that is none.
        """
        from ...choosing.criteria import criterion as criterion_of

        need(*criterion_of(self.criterion).needs)
        self.config(seed=0)

    def config(self, seed: int) -> SearchConfig:
        """As `choose_plan` takes it. Raises `UsageError` for a time that is none."""
        return SearchConfig(self.max_minutes, self.patience, seed)


def tasks_of(objectives: Sequence[str], prompts: Path | None) -> list[str]:
    """The tasks that objectives are made of. Raises `UsageError` for what is none, and
    for prompts that are none.
    """
    from ...choosing.objective import terms_of
    from ...models.texts import read_prompts

    parts = [name for one in objectives for _, name in terms_of(one, prompts)]
    if "answers" in parts and prompts:
        read_prompts(prompts)
    return [name.removeprefix("task:") for name in parts if name.startswith("task:")]
