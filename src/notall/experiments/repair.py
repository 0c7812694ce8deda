"""Repair what a plan keeps, in closed form or by another method, or heal it by a short distillation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from ..errors import UsageError, shortened
from ..models.names import DEFAULT_TEXT
from ..options import Option
from ..plan import Plan
from ..progress import Progress
from ..results.provenance import Provenance
from ..results.repairs import LITTLE, REFITS
from ..results.table import Table, table
from .evaluate import shown_measured
from .folder import Folder, Shown
from .options import ClusterOptions, ModelOptions, check_texts
from .verdict import what_next

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..repairing.healing import Spread
    from ..repairing.students import TrainConfig
    from ..repairing.texts import RepairTexts
    from ..running.repaired import RepairedPlan

REFIT = "refit"  # the method that is the default
NONE = "none"  # no repair, where one is the default
TOKENS = 131_072  # that a healing trains on
METHODS = f"{REFIT}, replaceme, prune-and-comp, or a function of your own, as module:function"


@dataclass(frozen=True)
class RepairOptions:
    PANEL: ClassVar = "Repair"

    repair: Annotated[str | None, Option(f"repair what is kept first: {METHODS}", metavar="METHOD")] = None
    repair_text: Annotated[tuple[str, ...], Option("text to fit to; repeat it for more (default: prose)")] = ()
    repair_sequences: Annotated[int | None, Option("windows of 512 tokens to fit to (default: up to 128)")] = None

    def __bool__(self) -> bool:
        return self.repair not in (None, NONE)

    def check(self) -> None:
        """Raise `UsageError` for a method that no plan can keep, and for texts that cannot be read."""
        if self:
            check_method(str(self.repair))
        check_texts(*self.repair_text)

    def apply(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        plan: Plan,
        out: Path | None,
        provenance: Provenance,
        progress: Progress,
    ) -> tuple[Plan, dict[str, list[Tensor]]]:
        """The plan after the repair, unless it needs none, and windows that it was not fitted to."""
        from ..repairing.texts import RepairTexts

        texts = RepairTexts.draw(model, tokenizer, self.repair_text or (DEFAULT_TEXT,), sequences=self.repair_sequences)
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
        """Raise `UsageError` for a text that cannot be read, and for too few windows."""
        check_texts(*self.text, *self.held_out)
        _ = self.windows

    @property
    def windows(self) -> int | None:
        """How many to fit to; None: as many as there are, up to a usual number."""
        return self.sequences

    def draw(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, most: int | None = None
    ) -> RepairTexts:
        from ..repairing.texts import RepairTexts

        texts, size = self.text or (DEFAULT_TEXT,), {"sequences": self.windows, "most": most, "length": self.length}
        return RepairTexts.draw(model, tokenizer, texts, self.held_out, **size, seed=seed)


@dataclass(frozen=True)
class HealTexts(FitOptions):
    """The texts that are trained on, and those that what came out is measured on."""

    text: Annotated[tuple[str, ...], Option("text to train on; repeat it for more (default: prose)")] = ()
    sequences: Annotated[
        int | None, Option("windows to train on, of all texts together (default: up to 131,072 tokens)")
    ] = None
    batch_size: Annotated[int, Option("windows of a step")] = 4
    sample: Annotated[bool, Option("train on what the dense model writes, from the first words of each window")] = False
    tokens: Annotated[int | None, Option("instead of --sequences: tokens to train on, of all texts together")] = None

    @property
    def windows(self) -> int | None:
        """How many to train on; None: as many as there are. Raises `UsageError` for less than one."""
        if self.tokens is None:
            return self.sequences
        if self.sequences is not None:
            raise UsageError("--tokens and --sequences both say how much to train on: give one of them")
        if self.tokens < self.length:
            raise UsageError(f"--tokens {shortened(self.tokens)} is less than one window of {self.length}: give more")
        return self.tokens // self.length


@dataclass(frozen=True)
class HealOptions:
    PANEL: ClassVar = "Training"

    train: Annotated[
        Literal["outputs", "all", "lora"],
        Option(
            "what to train: outputs (norms and output projections), all (every kept weight), or lora (thin matrices "
            "beside each kept one, added to it in the end)",
            metavar="WHAT",
        ),
    ] = "outputs"
    rank: Annotated[int | None, Option("rank of the matrices of --train lora (default: 16)")] = None
    rate: Annotated[float, Option("the learning rate to begin with")] = 3e-4
    warm_up: Annotated[
        float,
        Option(
            "for this share of the tokens, 0 to 1, train each kept sublayer alone to the dense model's stream",
            metavar="SHARE",
        ),
    ] = 0.0

    def config(self, seed: int) -> TrainConfig:
        from ..repairing.students import TrainConfig

        if not 0 < self.rate < 1:
            raise UsageError(f"--rate {self.rate} is no learning rate: give one such as 3e-4")
        if self.rank is not None and (self.train != "lora" or self.rank < 1):
            raise UsageError(f"--rank {shortened(self.rank)} is of no use here: give 1 or more, with --train lora")
        rank = {} if self.rank is None else {"rank": self.rank}
        return TrainConfig(train=self.train, rate=self.rate, warm_up=self.warm_up, seed=seed, **rank)


@dataclass(frozen=True)
class HealRayOptions(ClusterOptions):
    def workers(self, model: ModelOptions, batch_size: int) -> Spread | None:
        if self.ray is None:
            return None
        from ..repairing.healing import Spread

        spread = Spread(model.arguments, self.ray, self.ray_workers)
        spread.check(batch_size)
        return spread


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


def refits_table(repaired: RepairedPlan, out: Path) -> Table:
    """What became of each sublayer, shown where much did; its facts are all of it."""
    shown = [one for one in repaired.refits if one.left <= 1 - LITTLE or one.why]
    refit = sum(len(one.sublayers) for one in repaired.refits if one.ridge is not None)
    total = sum(len(one.sublayers) for one in repaired.refits)
    title = (
        f"{out}: {refit} of {total} kept sublayers refit; refitting others did not help on held-out text; shown are "
        f"those that mend over {LITTLE:.0%}"
    )
    return replace(table(title, REFITS, shown), facts=repaired.refits)


def shown(folder: Folder) -> Shown:
    return shown_measured(folder, lambda verdict: what_next(verdict, folder.model, folder.path))
