"""The loss of a warm-up: a student's residual stream against the original model's,
sublayer by sublayer.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..plan import Plan
from ..running.recording import Recording
from ..structure.model_structure import ModelStructure, layer_modules
from .projections import reading_gains
from .streams import DenseStream, steps_of


class Layerwise:
    """The student's stream, sublayer by sublayer, and how far it is from where it
    should be.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        structure: ModelStructure,
        plan: Plan,
        layers: nn.Module,
    ) -> None:
        self.model, self.layers = model, layers
        self.steps = steps_of(structure, plan)
        dense = layer_modules(model, structure)
        self.metrics = reading_gains(model, dense, [step.parts for step in self.steps])

    @torch.no_grad()
    def targets(self, ids: Tensor) -> tuple[Recording, list[Tensor]]:
        """A batch as the original model runs it, and its streams behind each kept step
        and the gap that follows.
        """
        dense = DenseStream(self.model, [ids])
        return dense.recordings[0], [
            states for (states,) in dense.before(*(step.behind for step in self.steps))
        ]

    def loss(self, recording: Recording, streams: list[Tensor]) -> Tensor:
        """The squared distance over the target's square, mean over tokens and steps,
        (1,); no gradient crosses one.
        """
        hidden = recording.embedded  # (batch, tokens, hidden)
        least = torch.finfo(torch.float32).tiny
        losses: list[Tensor] = []
        for step, target, metric in zip(self.steps, streams, self.metrics):
            behind = step.run(self.layers, hidden, recording)
            off = ((behind - target).float().square() @ metric).flatten()  # (tokens,)
            size = (target.float().square() @ metric).flatten()  # (tokens,)
            losses.append((off / size.clamp_min(least)).mean())
            hidden = behind.detach()
        return torch.stack(losses).mean(0, keepdim=True)
