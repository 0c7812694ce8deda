"""The engine, how it represents weights, and which plans it measures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ...engines import Engine, engine_named
from ...errors import UsageError, shortened
from ...options import Workload, option
from ...plan import Plan, refuse_prefill
from ...results.provenance import Provenance
from ..options.plan import read_plans
from ..options.words import Words, words_of
from ..repair import METHOD_HELP, NONE, REFIT, check_method
from ..search.options import SpaceOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


DEFAULT_SPEEDUPS = "1.1,1.2"  # speedups that are found by default
MORE_SPEEDUPS = "1.3,1.5"  # those to add to them


def check_workload(workload: Workload) -> None:
    """Raise `UsageError` for what no engine is timed by."""
    if workload.rounds < 1:
        raise UsageError("times take a round at least: give --rounds 1 or more")
    if workload.concurrency != 1:
        raise UsageError("engines are timed on one sequence: leave --concurrency at 1")


@dataclass(frozen=True)
class EngineOptions:
    """The engine, how it represents weights, and what is measured with the model."""

    PANEL: ClassVar[str] = "Engine"

    engine: str = option(
        "llama.cpp",
        "llama.cpp (for a .gguf file), transformers, vllm, or your own module:Class",
    )
    types: Words = option(
        (),
        "ways to represent weights, with commas: F16, Q8_0, Q5_K_M, Q4_K_M in"
        " llama.cpp, int8, int4 in transformers, int8 in vllm (default: all that"
        " usually run). The original model is measured in plain weights too, and the"
        " plans' plain weights are deleted once they are quantised",
        metavar="TYPE",
    )
    threads: int | None = option(
        None, "threads of the engine (default: one for each core)", least=1
    )
    also: Words = option(
        (), "another model to measure with this one; repeat it for more"
    )

    def of(self, model: PreTrainedModel | None = None) -> Engine:
        """The engine, with plain weights in the dtype of a model. Raises `UsageError`
        where there is none so called.
        """
        from ...measuring.speed import cores
        from ...models.loading import dtype_name

        found = engine_named(self.engine)(self.threads or cores())
        return replace(found, dtype=dtype_name(model)) if model else found

    def check_plans(self, plans: Iterable[Plan]) -> None:
        """Raise `UsageError` for a plan that skips in the prompt alone, which none of
        the engines can run yet.
        """
        for plan in plans:
            refuse_prefill(plan, f"the engine {self.engine}")

    def provenance(
        self, about: Provenance, engine: Engine, workload: Workload, **more: object
    ) -> Provenance:
        """`about`, with what decides figures in the engine, as `more` does, and its
        version.
        """
        tokens = {
            "prompt_tokens": workload.prompt_tokens,
            "generation_tokens": workload.generation_tokens,
        }
        versions = {**about.where["versions"], engine.package: engine.version}
        asked = {"engine": self.engine, "threads": engine.threads}
        what = about.what | asked | tokens | more
        return Provenance(what=what, where=about.where | {"versions": versions})


@dataclass(frozen=True)
class ParetoPlans(SpaceOptions):
    """Which plans are measured: files, and those that the search finds."""

    skip: str = option(
        "sublayer",
        "find plans that skip these, such as attention:4,8, or what --speedups choose"
        " among",
        metavar="KIND[:HOW MANY,...]",
    )
    plan: tuple[Path, ...] = option(
        (), "plan file, folder of a repair, or published:NAME; repeat it for more"
    )
    speedups: Words = option(
        (),
        f"find plans of these speedups in torch (default: {DEFAULT_SPEEDUPS}, if no plan"
        " is given)",
    )
    repair: str = option(
        REFIT, f"measure repaired plans too: {METHOD_HELP}; or none", metavar="METHOD"
    )

    def given(self) -> dict[str, Plan]:
        """Plans by the names of their files. Raises `UsageError` for two of one name,
        and for a repair that is none.
        """
        if self.repair != NONE:
            check_method(self.repair)
        return read_plans(self.plan)

    @property
    def wanted(self) -> tuple[tuple[float, ...], list[float]]:
        """How many to skip, and how many times as fast to be. Raises `UsageError` for
        what is no number.
        """
        amounts, asked = self.amount.amounts, words_of(self.speedups)
        if not (self.plan or amounts or asked):
            asked = DEFAULT_SPEEDUPS.split(",")
        return amounts, [self._speedup(word) for word in asked]

    def _speedup(self, word: str) -> float:
        try:
            return float(word)
        except ValueError:
            given = shortened(",".join(self.speedups))
            raise UsageError(
                f"--speedups {given}: {shortened(word)!r} is no number; give some such"
                " as 1.1,1.2"
            ) from None
