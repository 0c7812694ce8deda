"""Options of repair and heal: the method, the texts to fit to, and the training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..errors import UsageError, shortened
from ..models.names import USAGE_MIX
from ..options import check_sizes, option
from ..plan import Plan
from ..progress import Progress
from ..repairing.fit_texts import LENGTH, SEQUENCES, FitTexts
from ..repairing.train_config import TrainConfig, Trained
from ..results.provenance import Provenance
from .folder import check_folder
from .options.cluster import ClusterOptions
from .options.model import ModelOptions
from .options.text import check_texts
from .options.words import Words
from .used import Use, windows_of
from .waiting import waiting

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..models.windows import Drawn
    from ..repairing.healing import Spread
    from ..repairing.texts import RepairTexts


REFIT = "refit"  # the method that is the default
NONE = "none"  # no repair, where one is the default
HEALING_TOKENS = 131_072  # that a healing trains on
STEP = 4  # windows of each training step
METHOD_HELP = (
    f"{REFIT}, replaceme, prune-and-comp, or a function of your own, as module:function"
)


@dataclass(frozen=True)
class RepairOptions:
    """Whether and how a plan is repaired first."""

    PANEL: ClassVar[str] = "Repair"

    repair: str | None = option(None, f"repair first: {METHOD_HELP}", metavar="METHOD")
    repair_text: Words = option((), "text to fit to; repeat it for more (default: mix)")
    repair_sequences: int | None = option(
        None, f"windows of {LENGTH} tokens to fit to (default: up to {SEQUENCES})"
    )

    def __bool__(self) -> bool:
        return self.repair not in (None, NONE)

    def check(self, out: Path | None) -> None:
        """Raise `UsageError` for a method that no plan can keep, texts that cannot be
        read, and a folder of others.
        """
        check_sizes(1 if self.repair_sequences is None else self.repair_sequences)
        if self:
            check_folder(out, "repair")
            check_method(str(self.repair))
        check_texts(*self.repair_text)

    @property
    def sources(self) -> Words:
        """The texts to fit to."""
        return self.repair_text or (USAGE_MIX,)

    def texts(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        progress: Progress,
        *,
        seed: int = 0,
        used: Sequence[Drawn] = (),
    ) -> RepairTexts:
        """Windows to fit to, and others to measure on, which overlap none that was
        `used` to choose the plan.
        """
        from ..repairing.texts import RepairTexts

        wanted = FitTexts(self.sources, sequences=self.repair_sequences, seed=seed)
        return RepairTexts.draw(model, tokenizer, wanted, used=used, progress=progress)

    def apply(
        self,
        model: PreTrainedModel,
        plan: Plan,
        texts: RepairTexts,
        out: Path | None,
        provenance: Provenance,
        progress: Progress,
    ) -> Plan:
        """The plan after the repair, unless it needs none."""
        from ..repairing.methods import repair_into

        if not plan or plan.state == "repaired":
            return plan
        about = Provenance.of(provenance, **texts.described)
        return repair_into(
            out, str(self.repair), model, plan, texts.together(8), about, progress
        )


@dataclass(frozen=True)
class FitOptions:
    """The texts that weights are fitted to, and those that what came out is measured
    on.
    """

    PANEL: ClassVar[str] = "Text"

    text: Words = option(
        (),
        "text to fit to; repeat it, since two kinds repair better than one (default:"
        " mix)",
    )
    held_out: Words = option(
        (),
        "text to measure on; repeat it for more (default: other windows of each --text;"
        " they are of a copy of it, too)",
    )
    sequences: int | None = option(
        None, f"windows to fit to, of all texts together (default: up to {SEQUENCES})"
    )
    length: int = option(LENGTH, "tokens in each window", least=1)
    batch_size: int = option(8, "windows to run at a time")

    def check(self) -> None:
        """Raise `UsageError` for numbers that make no windows, and for a text that
        cannot be read.
        """
        check_sizes(
            1 if self.windows is None else self.windows, self.length, self.batch_size
        )
        check_texts(*self.text, *self.held_out)

    @property
    def windows(self) -> int | None:
        """How many to fit to; None: as many as there are, up to a usual number."""
        return self.sequences

    def draw(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        used: Sequence[Use],
        *,
        training: bool,
    ) -> RepairTexts:
        """Windows to fit to, and others to measure on, which overlap none that is
        `used` already.
        """
        from ..repairing.texts import RepairTexts

        texts = self.text or (USAGE_MIX,)
        most = HEALING_TOKENS // self.length if training else None
        wanted = FitTexts(texts, self.held_out, self.windows, most, self.length, seed)
        with waiting("reading the texts") as progress:
            apart = windows_of(used, model, tokenizer, self.held_out or texts)
            return RepairTexts.draw(
                model,
                tokenizer,
                wanted,
                training=training,
                used=apart,
                progress=progress,
            )


@dataclass(frozen=True)
class HealTexts(FitOptions):
    """The texts that are trained on, and those that what came out is measured on."""

    text: Words = option((), "text to train on; repeat it for more (default: mix)")
    sequences: int | None = option(
        None,
        f"windows to train on, of all texts together (default: up to {HEALING_TOKENS:,} tokens)",
    )
    batch_size: int = option(
        STEP, "windows of each training step", ("--per-step", "--batch-size")
    )
    sample: bool = option(
        False,
        "train on text by the original model, from the first words of each window",
    )
    tokens: int | None = option(
        None, "instead of --sequences: tokens to train on, of all texts together"
    )

    @property
    def windows(self) -> int | None:
        """How many to train on; None: as many as there are. Raises `UsageError` for
        less than one.
        """
        if self.tokens is None:
            return self.sequences
        if self.sequences is not None:
            raise UsageError(
                "--tokens and --sequences both say how much to train on: give one of"
                " them"
            )
        if self.tokens < self.length:
            raise UsageError(
                f"--tokens {shortened(self.tokens)} is less than one window of"
                f" {self.length}: give more"
            )
        return self.tokens // self.length


@dataclass(frozen=True)
class HealOptions:
    """What is trained, how fast, and for how long."""

    PANEL: ClassVar[str] = "Training"

    train: Trained = option(
        TrainConfig.train,
        "outputs (norms and output projections), all weights, or lora (merged in the"
        " end)",
        metavar="WHAT",
    )
    rank: int | None = option(
        None, f"rank of the matrices of --train lora (default: {TrainConfig.rank})"
    )
    rate: float = option(TrainConfig.rate, "the learning rate to begin with")
    warm_up: float = option(
        TrainConfig.warm_up,
        "share of the training, 0 to 1, that fits each sublayer alone to the original's"
        " stream",
        metavar="SHARE",
    )
    minutes: float | None = option(
        TrainConfig.minutes,
        "minutes of CPU time, of all threads together, to train for, repeating the text"
        " (default: once over it)",
    )

    def config(self, seed: int) -> TrainConfig:
        """As the training takes it. Raises `UsageError` for numbers of no use."""
        if not 0 < self.rate < 1:
            raise UsageError(
                f"--rate {self.rate} is no learning rate: give one such as 3e-4"
            )
        if self.rank is not None and (self.train != "lora" or self.rank < 1):
            raise UsageError(
                f"--rank {shortened(self.rank)} is of no use here: give 1 or more, with"
                " --train lora"
            )
        given = {name: value for name, value in vars(self).items() if value is not None}
        return TrainConfig(**given, seed=seed)


@dataclass(frozen=True)
class HealRayOptions(ClusterOptions):
    """On which Ray cluster a training is spread."""

    def workers(self, model: ModelOptions, batch_size: int) -> Spread | None:
        """The workers that share each step of `batch_size` windows; None without a
        cluster.
        """
        if self.ray is None:
            return None
        from ..repairing.healing import Spread

        spread = Spread(model.for_workers, self.ray, self.ray_workers)
        spread.check(batch_size)
        return spread


def check_method(name: str, offload: Path | None = None) -> None:
    """Raise `UsageError` for a repair that there is none of, that no plan can keep, or
    that knows no offloading.
    """
    from ..repairing.methods import method

    adds = method(name).adds
    if adds != "nothing":
        method_name = shortened(name)
        raise UsageError(
            f"{method_name} keeps {adds} at run time, which no checkpoint has room for:"
            f" measure it with `notall compare --repair {method_name}`, or give"
            f" --repair {REFIT}"
        )
    if offload and name != REFIT:
        raise UsageError(f"--offload goes with --repair {REFIT}, the default")
