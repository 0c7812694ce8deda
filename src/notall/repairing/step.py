"""One step of a repair: what was seen of it on the calibration text, and what became of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .projections import OutputProjection


@dataclass(frozen=True)
class Seen:
    """A step's streams and features on all of the text, a tensor a batch.

    `before`, `behind` and `target` are (batch, tokens, hidden): the skipped model's stream before and behind the step
    as it is, and what it should be behind it. `features` are (batch x tokens, features) each, those of its projections
    side by side, times their scales. `held` says which sequences choose the ridge, (batch,), and `metric` how much
    each channel of the stream counts, (hidden,), about 1.
    """

    layer: nn.Module
    projections: tuple[OutputProjection, ...]
    before: list[Tensor]
    behind: list[Tensor]
    target: list[Tensor]
    features: list[Tensor]
    held: list[Tensor]
    metric: Tensor

    @property
    def exact(self) -> torch.dtype:
        """What is computed in."""
        return torch.promote_types(self.features[0].dtype, torch.float32)

    @property
    def count(self) -> int:
        """Of all tokens."""
        return sum(len(features) for features in self.features)

    def tokens(self, held: bool) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Features, `before`, `behind` and `target` of the tokens that are held out, or of those that are not."""
        for number, rows in enumerate(self.held):
            chosen = rows if held else ~rows
            if chosen.any():
                features = self.features[number].view(*self.target[number].shape[:2], -1)
                streams = (features, self.before[number], self.behind[number], self.target[number])
                taken = (stream[chosen.to(stream.device)].flatten(0, 1) for stream in streams)
                features, before, behind, target = (stream.to(rows.device, self.exact) for stream in taken)
                yield features, before, behind, target

    def counts(self, target: Tensor) -> Tensor:
        """How much each token counts, (tokens,): by the mean square of its target, so that no few of them own all."""
        return 1 / (target.square() @ self.metric.to(target)).clamp_min(torch.finfo(target.dtype).tiny ** 0.5)


@dataclass(frozen=True)
class Refit:
    """New weights of a step, by their paths below its layer.

    `left` is the share of the squared error that is left on the sequences that were held out.
    """

    ridge: float
    left: float
    weights: dict[str, Tensor]
