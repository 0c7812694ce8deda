"""The plans that a front measures: given, or found for counts and speedups; as they are, and repaired."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from ...choosing.budget import Budget, by_count
from ...choosing.choice import choose_plan, keep_choice
from ...choosing.latency import Workload, measure_times
from ...choosing.objective import kl
from ...choosing.space import Space, names_of
from ...choosing.speedups import by_speedup
from ...progress import Progress, Stages, silent
from ...records.ledger import Ledger
from ...records.plan import Plan
from ...records.provenance import Provenance
from ...records.search import SearchRecord
from ...repairing.refitting import repair
from ...running.repaired import RepairedPlan

CHOSEN_BY = 16  # sequences of the text; all of it is repaired with
PATIENCE = 12  # evaluations that bring nothing, before a search ends


def found_plans(
    model: PreTrainedModel,
    space: Space,
    batches: Sequence[Tensor],
    folder: Path,
    about: Provenance,
    *,
    counts: Sequence[float] = (),
    speedups: Sequence[float] = (),
    workload: Workload | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Plan]:
    """By name what the search skips of `space` to skip so many, or to run the workload so many times as fast.

    What is found is kept in `folder`, and found again there. Raises `UsageError` as `choose_plan` does.
    """
    stages = Stages(progress, len(counts) + len(speedups))
    found: dict[str, Plan] = {}
    asked: dict[str, Callable[[], Budget]] = {
        f"less {count:g} {space}": partial(by_count, space, count) for count in counts
    }
    faster = partial(_budget_of_speed, model, space, workload or Workload())
    asked |= {f"{speedup:g}x in torch": partial(faster, speedup) for speedup in speedups}
    for name, budget in asked.items():
        found[name] = _found(model, space, budget, batches, folder / file_name(name), about, seed, stages.stage(1))
    return found


def with_repairs(
    model: PreTrainedModel,
    plans: Mapping[str, Plan],
    batches: Sequence[Tensor],
    folder: Path,
    about: Provenance,
    *,
    progress: Progress = silent,
) -> list[tuple[str, Plan]]:
    """Each plan as it is, and then repaired with `batches`; one that brings weights is repaired already."""
    stages = Stages(progress, len(plans))
    both: list[tuple[str, Plan]] = []
    for name, plan in plans.items():
        stage = stages.stage(1)
        if isinstance(plan, RepairedPlan):
            both += [(name, plan.unrepaired), (name, plan)]
            continue
        kept = folder / f"{file_name(name)}-repaired"
        both += [(name, plan), (name, repair(model, plan, batches, folder=kept, settings=about, progress=stage))]
    return both


def file_name(name: str) -> str:
    return name.replace("/", "-").replace(" ", "-")


def _budget_of_speed(model: PreTrainedModel, space: Space, workload: Workload, faster: float) -> Budget:
    return by_speedup(space, measure_times(model, workload), faster)


def _found(
    model: PreTrainedModel,
    space: Space,
    budget: Callable[[], Budget],
    batches: Sequence[Tensor],
    folder: Path,
    about: Provenance,
    seed: int,
    progress: Progress,
) -> Plan:
    source = Provenance.of(about, space=str(space), chosen_of=list(space.names))
    for record in Ledger(folder, SearchRecord, source):
        return space.plan(names_of(record.plan))
    own = [row for batch in batches for row in batch.split(1)][:CHOSEN_BY]
    chosen = choose_plan(
        model,
        "search",
        space,
        budget(),
        own,
        kl(own),
        folder=folder,
        settings=source,
        patience=PATIENCE,
        seed=seed,
        progress=progress,
    )
    keep_choice(folder, chosen.record(source))
    return chosen.plan
