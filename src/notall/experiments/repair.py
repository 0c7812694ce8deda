"""Repair what a plan keeps, in closed form or by another method, and measure it before and after."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from ..errors import UsageError, shortened
from ..options import Option
from ..plan import Plan
from ..progress import Progress
from ..results.provenance import Provenance
from ..results.repairs import LITTLE, REFITS, MeasuredRecord, RefitRecord
from ..results.table import Table, table
from .folder import Folder
from .measured import last_measured, shown_measured
from .shown import Shown
from .verdict import Outcome, Verdict, mending, next_command, plan_message

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..running.repaired import RepairedPlan

REFIT = "refit"  # the method that is the default
NONE = "none"  # no repair, where one is the default


@dataclass(frozen=True)
class RepairOptions:
    """Whether and how what is kept is repaired first."""

    PANEL: ClassVar = "Repair"

    repair: Annotated[
        str | None, Option("repair what is kept first, as `notall repair`: refit takes minutes", metavar="METHOD")
    ] = None
    repair_text: Annotated[tuple[str, ...], Option("text to fit to; repeat it for more (default: prose)")] = ()
    repair_sequences: Annotated[
        int | None, Option("windows of 512 tokens to fit to (default: up to 128, which take minutes)")
    ] = None

    def __bool__(self) -> bool:
        return self.repair not in (None, NONE)

    def check(self) -> None:
        """Raise `UsageError` for a method that no plan can keep, and for texts that cannot be read."""
        from ..models.texts import read_text

        if self:
            check_method(str(self.repair))
        for source in self.repair_text:
            read_text(source)

    def apply(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        plan: Plan,
        out: Path | None,
        provenance: Provenance,
        progress: Progress,
    ) -> tuple[Plan, dict[str, list[Tensor]]]:
        """The plan after the repair, of the usual size unless told otherwise, and windows that it was not fitted to.

        A plan that skips nothing, or is repaired already, stays as it is.
        """
        from ..repairing.texts import RepairTexts

        texts = RepairTexts.draw(model, tokenizer, self.repair_text or ("prose",), sequences=self.repair_sequences)
        if not plan or plan.state == "repaired":
            return plan, texts.other
        about = Provenance.of(provenance, **texts.described)
        repaired = repaired_by(str(self.repair), model, plan, texts.together(8), out, about, progress)
        return repaired, texts.other


@dataclass(frozen=True)
class FitOptions:
    """The texts that weights are fitted to, and those that what came out is measured on."""

    PANEL: ClassVar = "Text"

    text: Annotated[
        tuple[str, ...], Option("text to fit to; repeat it, since two kinds repair better than one (default: prose)")
    ] = ()
    held_out: Annotated[
        tuple[str, ...], Option("text to measure on; repeat it for more (default: other windows of each --text)")
    ] = ()
    sequences: Annotated[int | None, Option("windows to fit to, of all texts together (default: up to 128)")] = None
    length: Annotated[int, Option("tokens in each window")] = 512
    batch_size: Annotated[int, Option("windows to run at a time")] = 8

    def check(self) -> None:
        """Raise `UsageError` for a text that cannot be read."""
        from ..models.texts import read_text

        for source in (*self.texts, *self.held_out):
            read_text(source)

    @property
    def texts(self) -> tuple[str, ...]:
        return self.text or ("prose",)


def check_method(name: str, offload: Path | None = None) -> None:
    """Raise `UsageError` for a repair that there is none of, that no plan can keep, or that knows no offloading."""
    from ..repairing.methods import method

    adds = method(name).adds
    if adds != "nothing":
        raise UsageError(
            f"{shortened(name)} keeps {adds} at run time, which no checkpoint has room for: measure it with `notall "
            f"compare --repair {shortened(name)}`, or give --repair {REFIT}"
        )
    if offload and name != REFIT:
        raise UsageError(f"--offload goes with --repair {REFIT}, the default")


def repaired_by(
    method: str,
    model: PreTrainedModel,
    plan: Plan,
    batches: list[Tensor],
    out: Path | None,
    provenance: Provenance,
    progress: Progress,
    offload: Path | None = None,
) -> RepairedPlan:
    """`plan` with weights by a method, kept in the folder `out`. Raises as `notall.repair` does."""
    if method == REFIT:
        from ..repairing.refitting import repair

        return repair(model, plan, batches, offload=offload, out=out, provenance=provenance, progress=progress)
    from ..repairing.methods import repair_into

    if out is None:
        raise UsageError(f"--repair {method} keeps its weights: give --out")
    return repair_into(out, method, model, plan, batches, provenance, progress)


def verdict_of(model: PreTrainedModel, spec: str, measured: MeasuredRecord, out: Path) -> Verdict:
    """What a plan comes to with the weights in `out`, as it was measured last; it is healed where it is of no use."""
    exported = next_command("export", spec, plan=out, to="hf", out=out.with_name(f"{out.name}-pruned"))
    mend = mending(spec, out, repaired=True) if measured.model == "repaired" else exported
    return Verdict.on(model, measured.plan, measured.quality, measured.text).then(mend, exported)


def refits_table(repaired: RepairedPlan, out: Path) -> tuple[Table, tuple[RefitRecord, ...]]:
    """What became of each sublayer, for the terminal where much did; and all of it."""
    shown = [one for one in repaired.refits if one.left <= 1 - LITTLE or one.why]
    refit = sum(len(one.sublayers) for one in repaired.refits if one.ridge is not None)
    total = sum(len(one.sublayers) for one in repaired.refits)
    title = (
        f"{out}: {refit} of {total} kept sublayers refit; refitting others did not help on held-out text; shown are "
        f"those that mend over {LITTLE:.0%}"
    )
    return table(title, REFITS, shown), repaired.refits


def shown(folder: Folder) -> Shown:
    """What a page says of a folder that `repair` wrote."""
    found, last = shown_measured(folder), last_measured(folder)
    if last is None:
        return found
    said = Outcome(last.plan, last.quality, state=last.model, layers=folder.layers).sentence(folder.model)
    return replace(found, message=plan_message(said, folder.model, folder.path, last.quality, last.model))
