"""What is recorded of a search."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from ...results.facts import Footprint, Quality, SearchCost, SpeedCheck
from ...results.ledger import Ledger, working_in
from ...results.provenance import Provenance
from ...results.record import Amount, Number, Record, RecordKey, Skips, SublayerName

if TYPE_CHECKING:
    from ...choosing.choice import ChosenPlan


# Times are no part of the key: they are never the same twice.
class SearchRecord(Record, Skips, kind="search", key=("chosen", "plan", "in_time")):
    """A plan that was chosen, and what was measured of it, if anything."""

    chosen: str = Field(description="how, by what, and how much")
    order: tuple[tuple[SublayerName, ...], ...] = Field(
        description="what was skipped together, in order of choosing"
    )
    dense_cost: Number = Field(description="the objective of the original model")
    cost: Number = Field(description="the objective of the plan")
    spent: SearchCost
    forwards: Amount = Field(
        description="executions in dense forward passes over the calibration text"
    )
    in_time: bool = Field(description="found before the time was up")
    missed: str | None = Field(
        None, description="what was reached of a budget that was not; None where it was"
    )
    quality: Quality | None = Field(None, description="on held-out text")
    check: SpeedCheck | None = Field(None, description="where a speedup was asked for")
    footprint: Footprint | None = Field(None, description="what the plan leaves")
    dense: Footprint | None = Field(None, description="of the original model")

    @property
    def key(self) -> RecordKey:
        """Chosen again from the same text, it is the same choice."""
        return (
            *super().key,
            self.spent.evaluations,
            self.provenance and self.provenance.key,
        )


def keep_choice(out: Path, found: ChosenPlan, provenance: Provenance) -> SearchRecord:
    """A choice, what it took, and its measurements, written into `out` unless they are
    there.
    """
    dense, left = found.weighed or (None, None)
    same = {
        name: value
        for name, value in vars(found).items()
        if name in SearchRecord.model_fields
    }
    record = SearchRecord(
        **same,
        chosen=found.plan.note or "",
        quality=found.held_out[1] if found.held_out else None,
        check=found.times,
        footprint=left,
        dense=dense,
        provenance=provenance,
    )
    with working_in(out, "search"):
        choices = Ledger(out, SearchRecord)
        if record.key not in choices:
            choices.add(record)
    return record
