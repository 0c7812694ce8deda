"""What a run is of, and how its plans are timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from ..options import Workload
from ..plan import Plan
from ..progress import Progress, silent
from ..results.facts import Footprint, Quality, Scores, Times
from ..results.provenance import Provenance
from ..results.record import Skips

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation.ray_workers import Workers
    from ..structure.model_structure import ModelStructure


@dataclass(frozen=True)
class Subject:
    """What a run is of: a model, its tokenizer and a text, (batch, tokens) token ids
    each; and where its results go.

    `workers` score plans and answer tasks, if given; times are always this process's.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    batches: Sequence[Tensor]
    out: Path
    provenance: Provenance
    seed: int = 0
    workers: Workers | None = None

    @property
    def structure(self) -> ModelStructure:
        """The model's sublayers."""
        from ..structure.locating import locate

        return locate(self.model)

    @property
    def tokens(self) -> int:
        """How many tokens the text has."""
        return sum(batch.numel() for batch in self.batches)

    def score(
        self, plans: Sequence[Plan], tokens: Tensor, prompt_tokens: int | None = None
    ) -> list[Scores]:
        """As `quality.score`: of the original model, then of each plan."""
        from ..measuring.quality import score

        if self.workers:
            return self.workers.score(plans, tokens, prompt_tokens)
        return score(self.model, plans, tokens, prompt_tokens)


def time_plan(
    subject: Subject,
    plan: Plan,
    workload: Workload,
    progress: Progress = silent,
    name: str = "",
) -> Times:
    """Prefill and decode of a plan and the original model in turn; of the plan."""
    from ..measuring.speed import time_plans

    plans = {name: plan} if plan else {}
    times = time_plans(
        subject.model, plans, workload, seed=subject.seed, progress=progress
    )
    return [*times.values()][-1]


class MeasuredPlan(Skips):
    """What pages ask of a plan: how much it loses, and what it saves."""

    quality: Quality
    times: Times | None = Field(None, description="where plans were timed")
    footprint: Footprint

    @property
    def way(self) -> str:
        """What a sentence calls it."""
        return self.name
