"""How a recovery fine-tuning trains: which weights, how fast, and for how long."""

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import UsageError

Trained = Literal["outputs", "all", "lora"]


@dataclass(frozen=True)
class TrainConfig:
    """How a healing trains: AdamW, whose learning rate rises to `rate` in up to ten
    steps and falls to none.

    `train` says which weights: `outputs` are norms and output projections, `all` those
    of every kept sublayer, and `lora` has two thin matrices of `rank` for each of
    those, which are added to them in the end. For the share `warm_up` of the steps each
    kept sublayer aims at the original's stream behind it, and only then all of them at
    the next token. The held-out text is looked at `evaluations` times, evenly;
    `patience` of them in a row without a gain end it: while the rate is high there may
    be none, and as it falls there are.

    Of a plan that skips in the prompt alone, the prompt's own keys and values are
    trained, whatever `train` says, at what follows the first `prompt_tokens` of each
    window (default: half of them).

    With `minutes` (of CPU time, of all threads of this process together) it trains for
    all of them, evaluations included, over the text as often as there is time: shares
    are of the time, and the rate is none when it is up. Raises `UsageError` for a time
    that is not positive and finite, and a warm-up that is no share.
    """

    train: Trained = "outputs"
    rank: int = 16
    rate: float = 3e-4
    warm_up: float = 0.0
    seed: int = 0
    evaluations: int = 10
    patience: int = 5
    minutes: float | None = None
    prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.warm_up <= 1:
            raise UsageError(
                f"a warm-up of {self.warm_up} is no share of the training: give one"
                " from 0 to 1"
            )
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise UsageError(
                f"{self.minutes} minutes of CPU time are none to train for: give more"
                " than 0, such as 3"
            )
