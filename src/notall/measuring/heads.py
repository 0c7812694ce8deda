"""What comes behind the last layer of a model, as logits, and as a matrix where it is one.

Shapes: rows of the last layer's output are (rows, hidden), what the output projection
is given (rows, width), and logits (rows, vocabulary).
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModel
from ..running.recording import handing, states_before_output
from ..structure.calls import forward_of
from ..structure.locating import locate
from ..structure.model_structure import base_model, inputs_device, text_config
from ..structure.undoing import Undo

LARGE = 30.0  # of the probe's logits: beyond the caps that are in use


@dataclass(frozen=True)
class Projection:
    """A head that is a matrix: its logits are `scale` * states @ `weight`.T +
    `bias`.
    """

    weight: Tensor  # (vocabulary, width), the model's own
    bias: Tensor | None  # (vocabulary,), float32
    scale: float


class Head:
    """What comes behind the last layer of `model`. Raises `UnsupportedModel` where that
    mixes tokens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = base_model(model)
        self.structure = locate(self.model)
        self.output: nn.Module | None = self.model.get_output_embeddings()
        known = _PROBED.get(self.model)
        if known is None or known[0] is not self.output:
            known = _PROBED[self.model] = self.output, self._probe()
        self.projection = known[1]  # None where it is no matrix

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, vocabulary), from rows of the last layer's output, (rows, hidden)."""
        return self._behind(hidden[:, None]).flatten(0, -2)  # of (rows, 1, vocabulary)

    def states(self, hidden: Tensor) -> Tensor:
        """What the output projection is given, (rows, width), from rows of the last
        layer's output, (rows, hidden).
        """
        return states_before_output(
            self.model, lambda: self._behind(hidden[:, None])
        ).flatten(0, -2)

    def _behind(self, hidden: Tensor) -> Tensor:
        """The logits, (batch, tokens, vocabulary), of a forward in which `hidden` is
        what the last layer answers.
        """
        device = inputs_device(self.model)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=device)
        with handing(self.model, self.structure, hidden):
            return self.model(input_ids=ids, use_cache=False).logits

    @torch.no_grad()
    def _probe(self) -> Projection | None:
        """The head's matrix, where random rows say that it is one."""
        device = next(
            self.model.get_submodule(self.structure.layers).parameters()
        ).device
        device = (
            torch.device("cpu") if device.type == "meta" else device
        )  # accelerate takes them from there
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(
            2, 4, text_config(self.model).hidden_size, generator=generator
        )
        hidden = hidden.to(device, self.model.dtype)
        expected = self._behind(hidden).flatten(0, 1)
        rounding = 1e-4 if self.model.dtype in (torch.float32, torch.float64) else 2**-6
        if not _close(self.logits(hidden.flatten(0, 1)), expected, rounding):
            problem = (
                f"the head of {type(self.model).__name__} makes a token's logits from"
                " more than its own hidden state"
            )
            raise UnsupportedModel(f"{problem}: choose another model")
        output = self.output
        # quantised or adapted, or offloaded
        if not isinstance(output, nn.Linear) or {type(output), type(output.weight)} != {
            nn.Linear,
            nn.Parameter,
        }:
            return None
        if not output.weight.is_floating_point() or output.weight.device.type == "meta":
            return None
        if (scale := self._scale(output, hidden[0], generator)) is None:
            return None
        bias = None if output.bias is None else output.bias.detach().float() * scale
        found = Projection(output.weight.detach(), bias, scale)
        states = self.states(hidden.flatten(0, 1)).to(found.weight.device)
        logits = scale * (states @ found.weight.T).float() + (
            0.0 if bias is None else bias
        )
        return found if _close(logits, expected, rounding) else None

    def _scale(
        self, output: nn.Linear, hidden: Tensor, generator: torch.Generator
    ) -> float | None:
        """By what the model multiplies what `output` answers; None where it does
        anything else.
        """
        made = LARGE * torch.randn(
            len(hidden), output.out_features, generator=generator
        )

        def answer(states: Tensor) -> Tensor:
            return made.to(states.device).view(*states.shape[:-1], -1)

        with Undo() as undo, undo.put(*forward_of(output), answer):
            given = self.logits(hidden).cpu().double()
        if given.shape != made.shape:
            return None
        scale = float((given * made).sum() / made.double().square().sum())
        rounding = 1e-5 if self.model.dtype in (torch.float32, torch.float64) else 2**-7
        return (
            scale
            if (
                (given - scale * made).abs() <= rounding * abs(scale) * made.abs()
            ).all()
            else None
        )


_PROBED: WeakKeyDictionary[nn.Module, tuple[nn.Module | None, Projection | None]] = (
    WeakKeyDictionary()
)


def _close(found: Tensor, expected: Tensor, rounding: float) -> bool:
    if found.shape != expected.shape:
        return False
    expected = expected.to(found.device).float()
    return bool(
        (found.float() - expected).abs().max() <= rounding * expected.abs().max()
    )
