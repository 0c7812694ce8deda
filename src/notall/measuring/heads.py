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

LARGE_LOGIT = 30.0  # of the probe's logits: beyond the caps that are in use


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
        if known is None or known.output is not self.output:
            known = _Probed(self.output, self._probe())
            _PROBED[self.model] = known
        self.projection = known.projection

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, vocabulary), from rows of the last layer's output, (rows, hidden)."""
        logits = self._behind(hidden[:, None])  # (rows, 1, vocabulary)
        return logits.flatten(0, -2)

    def states(self, hidden: Tensor) -> Tensor:
        """What the output projection is given, (rows, width), from rows of the last
        layer's output, (rows, hidden).
        """
        one_by_one = hidden[:, None]  # (rows, 1, hidden)
        states = states_before_output(self.model, lambda: self._behind(one_by_one))
        return states.flatten(0, -2)

    def _behind(self, hidden: Tensor) -> Tensor:
        """The logits, (batch, tokens, vocabulary), of a forward in which `hidden` is
        what the last layer answers.
        """
        device = inputs_device(self.model)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=device)
        with handing(self.model, self.structure, hidden):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    @torch.no_grad()
    def _probe(self) -> Projection | None:
        """The head's matrix, where random rows say that it is one."""
        layers = self.model.get_submodule(self.structure.layers)
        device = next(layers.parameters()).device
        if device.type == "meta":  # accelerate takes them from the CPU
            device = torch.device("cpu")
        generator = torch.Generator().manual_seed(0)
        width = text_config(self.model).hidden_size
        hidden = torch.randn(2, 4, width, generator=generator)
        hidden = hidden.to(device, self.model.dtype)
        expected = self._behind(hidden).flatten(0, 1)  # (rows, vocabulary)
        rows = hidden.flatten(0, 1)  # (rows, hidden)
        rounding = 1e-4 if self._is_exact else 2**-6
        if not _close(self.logits(rows), expected, rounding):
            problem = (
                f"the head of {type(self.model).__name__} makes a token's logits from"
                " more than its own hidden state"
            )
            raise UnsupportedModel(f"{problem}: choose another model")
        output = self.output
        if not isinstance(output, nn.Linear) or not _is_plain(output):
            return None
        scale = self._scale(output, hidden[0], generator)
        if scale is None:
            return None
        bias = None if output.bias is None else output.bias.detach().float() * scale
        found = Projection(output.weight.detach(), bias, scale)
        states = self.states(rows).to(found.weight.device)  # (rows, width)
        products = (states @ found.weight.T).float()  # (rows, vocabulary)
        logits = scale * products + (0.0 if bias is None else bias)
        return found if _close(logits, expected, rounding) else None

    @property
    def _is_exact(self) -> bool:
        """Whether the model computes with so many bits that little is rounded."""
        return self.model.dtype in (torch.float32, torch.float64)

    def _scale(
        self, output: nn.Linear, hidden: Tensor, generator: torch.Generator
    ) -> float | None:
        """By what the model multiplies what `output` answers; None where it does
        anything else.
        """
        shape = len(hidden), output.out_features  # (rows, vocabulary)
        made = LARGE_LOGIT * torch.randn(shape, generator=generator)

        def answer(states: Tensor) -> Tensor:
            batch = states.shape[:-1]
            return made.to(states.device).view(*batch, -1)

        with Undo() as undo, undo.put(*forward_of(output), answer):
            given = self.logits(hidden).cpu().double()
        if given.shape != made.shape:
            return None
        squares = made.double().square().sum()
        scale = float((given * made).sum() / squares)
        rounding = 1e-5 if self._is_exact else 2**-7
        apart = (given - scale * made).abs()  # (rows, vocabulary)
        allowed = rounding * abs(scale) * made.abs()
        return scale if (apart <= allowed).all() else None


@dataclass(frozen=True)
class _Probed:
    """What a probe of a model with this output projection found."""

    output: nn.Module | None
    projection: Projection | None  # None where it is no matrix


_PROBED: WeakKeyDictionary[nn.Module, _Probed] = WeakKeyDictionary()


def _is_plain(output: nn.Linear) -> bool:
    """Whether a matrix is neither quantised, nor adapted, nor offloaded."""
    weight = output.weight
    if type(output) is not nn.Linear or type(weight) is not nn.Parameter:
        return False
    return weight.is_floating_point() and weight.device.type != "meta"


def _close(found: Tensor, expected: Tensor, rounding: float) -> bool:
    """Whether no value is farther off than rounding the largest one could make it."""
    if found.shape != expected.shape:
        return False
    expected = expected.to(found.device).float()
    apart = (found.float() - expected).abs().max()
    return bool(apart <= rounding * expected.abs().max())
