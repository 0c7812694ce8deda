"""Plans that are searched for and repaired before the engine measures them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...options import Workload
from ...plan import Plan, several_of
from ...progress import Progress, Stages, silent
from ...results.ledger import Ledger
from ...results.provenance import Provenance
from ..search.options import BudgetChoice
from ..search.records import SearchRecord, keep_choice

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ...choosing.space import Space


CHOSEN_BY = 16  # sequences of the text; all of it is repaired with


@dataclass(frozen=True)
class Finding:
    """Finds plans of a model by the search, and repairs them, on `batches` of token
    ids; kept in the folder `out`.
    """

    model: PreTrainedModel
    space: Space
    batches: list[Tensor]
    out: Path
    provenance: Provenance
    seed: int = 0

    def check(self, plan: Plan) -> None:
        """Raise `UsageError` where it is a plan, or a repair, of another model."""
        from ...running.repaired import RepairedPlan

        plan.check(self.space.structure)
        if isinstance(plan, RepairedPlan):
            plan.check_replaced(self.model)

    def found(
        self,
        counts: Sequence[float],
        speedups: Sequence[float],
        workload: Workload,
        progress: Progress = silent,
    ) -> dict[str, Plan]:
        """By name the plans that skip so many, or that run the workload so many times
        as fast.
        """
        budgets = {
            f"less {several_of(str(self.space), count)}": BudgetChoice(("count", count))
            for count in counts
        }
        for speedup in speedups:
            budgets[f"{speedup:g}x in torch"] = BudgetChoice(("speedup", speedup))
        stages = Stages(progress, len(budgets))
        return {
            name: self._searched(name, budget, workload, stages.stage(1))
            for name, budget in budgets.items()
        }

    def _searched(
        self, name: str, budget: BudgetChoice, workload: Workload, progress: Progress
    ) -> Plan:
        from ...choosing.choice import choose_plan
        from ...choosing.objective import kl
        from ...choosing.search_config import SearchConfig

        out, space = self.out / as_file_name(name), self.space
        source = Provenance.of(
            self.provenance, space=str(space), chosen_of=list(space.names)
        )
        for record in Ledger(out, SearchRecord, source):
            return space.plan(record.plan.names)
        own = [row for batch in self.batches for row in batch.split(1)][:CHOSEN_BY]
        chosen = choose_plan(
            self.model,
            "search",
            space,
            budget.of(self.model, space, workload),
            own,
            kl(own),
            SearchConfig(seed=self.seed, provenance=source),
            out=out,
            progress=progress,
        )
        keep_choice(out, chosen, source)
        return chosen.plan

    def repaired(
        self, plans: Mapping[str, Plan], method: str, progress: Progress = silent
    ) -> list[tuple[str, Plan]]:
        """Each plan as it is, and then repaired; one that brings weights is repaired
        already.
        """
        from ...repairing.methods import repair_into

        stages, both = Stages(progress, len(plans)), list[tuple[str, Plan]]()
        for name, plan in plans.items():
            stage, repaired = stages.stage(1), plan
            if plan.state != "repaired":
                out = self.out / f"{as_file_name(name)}-repaired"
                repaired = repair_into(
                    out, method, self.model, plan, self.batches, self.provenance, stage
                )
            both += [(name, plan.unrepaired), (name, repaired)]
        return both


def as_file_name(name: str) -> str:
    """A name without what no file name may have."""
    return name.replace("/", "-").replace(" ", "-")
