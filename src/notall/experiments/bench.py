"""Time prefill and decode of the original and the skipped model, interleaved in one
run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ..errors import UsageError
from ..options import Workload, option
from ..plan import Plan
from ..progress import Progress, silent
from ..results.facts import Footprint, Times
from ..results.ledger import Ledger, working_in
from ..results.provenance import Provenance
from ..results.record import Count, Fact, Record, Skips
from .options.model import ModelOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Timed(Fact):
    """A model that was timed: how long it takes, and what it weighs."""

    times: Times
    footprint: Footprint


class BenchRecord(Record, Skips, kind="bench"):
    """A plan and the original model, timed in one run. Every measurement is one of its
    own.
    """

    prompt_tokens: Count
    generation_tokens: Count
    concurrency: Count = Field(description="sequences at once")
    rounds: Count = Field(description="how often both were timed, in turn")
    dense: Timed
    skipped: Timed | None = Field(
        None, description="without what the plan skips; None where it skips nothing"
    )


@dataclass(frozen=True)
class ShapeOptions:
    """A model of random weights in place of a real one."""

    PANEL: ClassVar[str] = "Model"

    shape: str | None = option(
        None, "instead of MODEL: llama-2-7b, llama-2-13b, llama-2-70b or a config.json"
    )
    dummy_weights: bool = option(
        False, "use random weights, so that nothing is downloaded", ("--dummy-weights",)
    )

    def load(self, model: ModelOptions, seed: int) -> "PreTrainedModel":
        """The model that is named, or one of random weights."""
        if not (self.shape or self.dummy_weights):
            return model.load()[0]
        if not self.dummy_weights:
            raise UsageError("--shape has no weights of its own: add --dummy-weights")
        from ..models.configs import load_config
        from ..models.devices import resolve_device, resolve_dtype
        from ..models.weightless import build_random

        place = resolve_device(model.device)
        spec = self.shape or model.model
        config = load_config(
            spec, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        return build_random(
            config, dtype=resolve_dtype(model.dtype, place), device=place, seed=seed
        )


def bench(
    model: "PreTrainedModel",
    plan: Plan,
    workload: Workload,
    provenance: Provenance,
    *,
    out: Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> BenchRecord:
    """`plan` and the original, timed; kept in the folder `out`, if given, or
    `UsageError` before anything is timed.
    """
    from ..measuring.speed import time_plans
    from ..running.skipping import footprint

    with working_in(out, "bench"):
        kept = Ledger(out, BenchRecord) if out else None
        times = time_plans(
            model,
            {"skipped": plan} if plan else {},
            workload,
            seed=seed,
            progress=progress,
        )
        dense = Timed(times=times["dense"], footprint=footprint(model, Plan()))
        skipped = None
        if plan:
            left = footprint(model, plan)
            skipped = Timed(times=times["skipped"], footprint=left)
        source = Provenance.of(provenance, seed=seed)
        record = BenchRecord(
            plan=plan, **vars(workload), dense=dense, skipped=skipped, provenance=source
        )
        if kept is not None:
            kept.add(record)
    return record
