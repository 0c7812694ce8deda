"""Heal a plan by a short distillation, and measure it before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from ..errors import UsageError, shortened
from ..options import Option
from .options import ClusterOptions, ModelOptions
from .repair import FitOptions

if TYPE_CHECKING:
    from ..repairing.healing import Spread
    from ..repairing.students import TrainConfig

TOKENS = 131_072  # that are trained on


@dataclass(frozen=True)
class HealTexts(FitOptions):
    """The texts that are trained on, and those that what came out is measured on."""

    text: Annotated[tuple[str, ...], Option("text to train on; repeat it for more (default: prose)")] = ()
    sequences: Annotated[
        int | None, Option("windows to train on, of all texts together (default: up to 131,072 tokens)")
    ] = None
    batch_size: Annotated[int, Option("windows of a step")] = 4
    sample: Annotated[bool, Option("train on what the dense model writes, from the first words of each window")] = False

    tokens: Annotated[
        int | None, Option("instead of --sequences: tokens to train on, of all texts together (default: up to 131,072)")
    ] = None

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
    """How it is trained."""

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
        """Raises `UsageError` for a rate and a rank that are none."""
        from ..repairing.students import TrainConfig

        if not 0 < self.rate < 1:
            raise UsageError(f"--rate {self.rate} is no learning rate: give one such as 3e-4")
        if self.rank is not None and (self.train != "lora" or self.rank < 1):
            raise UsageError(f"--rank {shortened(self.rank)} is of no use here: give 1 or more, with --train lora")
        rank = {} if self.rank is None else {"rank": self.rank}
        return TrainConfig(train=self.train, rate=self.rate, warm_up=self.warm_up, seed=seed, **rank)


@dataclass(frozen=True)
class HealRayOptions(ClusterOptions):
    """With workers that share each batch."""

    ray: Annotated[
        str | None,
        Option("train on a Ray cluster: the running one, a new one, local, auto or HOST:PORT", metavar="[ADDRESS]"),
    ] = None

    def workers(self, model: ModelOptions, batch_size: int) -> Spread | None:
        """The workers; None without a cluster. Raises `UsageError` where they cannot."""
        if self.ray is None:
            return None
        from ..repairing.healing import Spread

        spread = Spread(model.arguments, self.ray, self.ray_workers)
        spread.check(batch_size)
        return spread
