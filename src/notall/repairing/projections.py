"""The output projections of sublayers, found by trying what becomes of random numbers
in place of answers.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..measuring.heads import Head
from ..running.recording import record
from ..structure.calls import LayerCall, child, forward_of
from ..structure.locating import locate
from ..structure.model_structure import (
    Sublayer,
    inputs_device,
    layer_modules,
    text_config,
)
from ..structure.undoing import Undo

PROBED = 16  # tokens to find a projection with
READERS = 4  # sublayers that follow: what is further away reads other streams
# Norms compute in float32, whatever is around them.
ROUNDING = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.float16: 2**-7,
    torch.bfloat16: 2**-5,
}


@dataclass(frozen=True)
class OutputProjection:
    """A sublayer's last matrix: it adds `scale` * (W z + bias) to the stream, and what
    does not depend on W.
    """

    path: str  # of the module, below its layer
    scale: float
    norm: str | None = None  # a path, too: then it adds `scale` * norm(W z + bias)

    def matrix(self, layer: nn.Module) -> Tensor:
        """(outputs, features), as it is in the model."""
        module = layer.get_submodule(self.path)
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.T if isinstance(module, Conv1D) else weight

    def bias(self, layer: nn.Module) -> Tensor | None:
        """(outputs,)"""
        return layer.get_submodule(self.path).bias  # type: ignore[return-value]

    def parameters(
        self, layer: nn.Module, matrix: Tensor, bias: Tensor | None
    ) -> dict[str, Tensor]:
        """New values as the module holds them, by their paths below the layer."""
        turned = isinstance(layer.get_submodule(self.path), Conv1D)
        found = {f"{self.path}.weight": (matrix.T if turned else matrix).contiguous()}
        return found if bias is None else found | {f"{self.path}.bias": bias}


class Projections:
    """Those of a model's sublayers, tried on a few of `tokens`, (batch, tokens);
    `shared`: ids of tied parameters.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor) -> None:
        self.layers = layer_modules(model, locate(model))
        self.probe = record(model, input_ids=tokens[:1, :PROBED])
        every = model.named_parameters(remove_duplicate=False)
        uses = Counter(id(one) for _, one in every)
        self.shared = {one for one, count in uses.items() if count > 1}
        self._found: dict[str, OutputProjection | None] = {}

    @torch.no_grad()
    def of(self, part: Sublayer, *, own: bool = False) -> OutputProjection | None:
        """That of a sublayer, if it has one; with `own` none whose weights are also
        another layer's.
        """
        if part.name not in self._found:
            call = LayerCall(self.probe.arguments[part.index])
            hidden = self.probe.embedded.to(self.probe.devices[part.index])
            trial = _Trial(self.layers[part.index], part, hidden, call)
            paths = reversed(trial.matrices()) if len(part.branches) == 1 else ()
            tried = (trial.of(path) for path in paths)
            self._found[part.name] = next((one for one in tried if one), None)
        found = self._found[part.name]
        if own and found:
            module = self.layers[part.index].get_submodule(found.path)
            if id(module.weight) in self.shared:
                return None
        return found


@contextmanager
def features_of(
    layer: nn.Module,
    projections: Sequence[OutputProjection],
    keep: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Iterator[Callable[[], list[Tensor]]]:
    """The inputs of these while the layer runs, times their scales, in one row:
    (tokens, features) a call.
    """
    seen: list[list[Tensor]] = [[] for _ in projections]

    def taken() -> list[Tensor]:
        """Of each call the features of all, (tokens, features)."""
        return [
            torch.cat(parts, 1) if len(parts) > 1 else parts[0] for parts in zip(*seen)
        ]

    def hook(number: int) -> Callable[..., None]:
        one = projections[number]

        def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            features = args[0].flatten(0, -2)  # (tokens, features)
            if not one.norm and one.scale != 1:
                features = one.scale * features
            seen[number].append(keep(features))

        return take

    with ExitStack() as hooks:
        for number, one in enumerate(projections):
            module = layer.get_submodule(one.path)
            hooks.enter_context(module.register_forward_pre_hook(hook(number)))
        yield taken


class _Trial:
    """One sublayer, run with other answers of its matrices."""

    def __init__(
        self, layer: nn.Module, part: Sublayer, hidden: Tensor, call: LayerCall
    ) -> None:
        self.layer, self.part, self.hidden, self.call = layer, part, hidden, call
        self.exact = torch.promote_types(hidden.dtype, torch.float32)
        self.rounding = ROUNDING[hidden.dtype]

    def matrices(self) -> list[str]:
        """The plain matrices, as wide as the stream, that answer for each token once,
        as they run: no experts'.
        """
        sizes: dict[str, list[int]] = {}  # numbers of each output of a module
        width = self.hidden.shape[-1]

        def hook(path: str) -> Callable[..., None]:
            def note(_: nn.Module, args: object, output: Tensor) -> None:
                sizes.setdefault(path, []).append(output.numel())

            return note

        with ExitStack() as hooks:
            for name in self.part.modules:
                for path, module in child(self.layer, name).named_modules(prefix=name):
                    if _is_plain(module, width):
                        hooks.enter_context(module.register_forward_hook(hook(path)))
            self._added()
        return [path for path, found in sizes.items() if found == [self.hidden.numel()]]

    def of(self, path: str) -> OutputProjection | None:
        """What becomes of the answers of the matrix at `path`."""
        draw = torch.Generator().manual_seed(0)
        size = self.hidden.float().std().clamp_min(1e-3).item()
        # of two sizes, as a norm would answer alike: (batch, tokens, hidden) each
        first, second = (
            times * size * torch.randn(self.hidden.shape, generator=draw)
            for times in (1, 3)
        )
        first = first.to(self.hidden.device, self.hidden.dtype)
        second = second.to(self.hidden.device, self.hidden.dtype)
        one, other = self._added(path, first), self._added(path, second)
        if one.shape != first.shape:
            return None
        scale = _factor(one - other, (first - second).to(self.exact), self.rounding)
        if scale is not None:
            return OutputProjection(path, scale)
        for op in self.part.branches[0].ops:
            if not op.module or path.startswith(op.module):
                continue
            norm = child(self.layer, op.module)
            if not is_norm(norm):
                continue
            scale = _factor(one, norm(first).to(self.exact), self.rounding)
            # it answers alike where all channels are larger, as norms do and
            # activations do not
            larger = norm(3 * (first / size)).to(self.exact)
            plain = norm(1 * (first / size)).to(self.exact)
            if scale is not None and _factor(larger, plain, self.rounding) == 1:
                return OutputProjection(path, scale, op.module)
        return None

    def _added(self, path: str | None = None, answer: Tensor | None = None) -> Tensor:
        """What the sublayer adds to the stream, with `answer` in place of what the
        matrix at `path` says.
        """
        branch = self.part.branches[0]
        if path is None or answer is None:
            return branch.run(self.layer, self.hidden, self.call)
        module = self.layer.get_submodule(path)

        def answered(given: Tensor) -> Tensor:
            return answer.view(*given.shape[:-1], -1)

        with Undo() as undo, undo.put(*forward_of(module), answered):
            added = branch.run(self.layer, self.hidden, self.call)
        added = added.view(self.hidden.shape).to(self.exact)
        return added - self.hidden.to(self.exact) if branch.adds_itself else added


def _factor(found: Tensor, made: Tensor, rounding: float) -> float | None:
    """By what `made` was multiplied; None where it was anything else."""
    factor = float((found * made).sum() / made.square().sum())
    off = (found - factor * made).abs().max()
    most = rounding * abs(factor) * made.abs().max()
    if not off <= most or not factor:
        return None
    return 1.0 if abs(factor - 1) < 1e-3 else factor


def is_matrix(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether it is a plain matrix, an `nn.Linear` or a `Conv1D`: not quantised, and
    not adapted.
    """
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    if type(module.weight) is not nn.Parameter:
        return False
    return module.weight.is_floating_point()


def _is_plain(module: nn.Module, width: int) -> bool:
    """Whether it is a matrix of so many outputs that lies in memory as it is: not
    offloaded either.
    """
    if not is_matrix(module) or module.weight.device.type == "meta":
        return False
    matrix = module.weight.T if isinstance(module, Conv1D) else module.weight
    if len(matrix) != width or type(module) in (nn.Linear, Conv1D):
        return len(matrix) == width
    # a linear layer of another class, such as Falcon's: does it do what its matrix and
    # bias say?
    draw = torch.Generator().manual_seed(0)
    given = torch.randn(2, matrix.shape[1], generator=draw).to(matrix)
    expected = nn.functional.linear(given, matrix, module.bias)
    off = (module(given) - expected).abs().max()
    return bool(off <= ROUNDING[matrix.dtype] * expected.abs().max())


def reading_gains(
    model: PreTrainedModel, layers: nn.ModuleList, steps: Sequence[tuple[Sublayer, ...]]
) -> list[Tensor]:
    """For the stream behind each step, (hidden,): the mean of the squared gains of its
    next readers, about 1.

    All are where the model's inputs are.
    """
    width = text_config(model).hidden_size
    ones = torch.ones(1, 1, width, device=inputs_device(model), dtype=model.dtype)

    def gain(norm: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Scaled to a mean square of 1."""
        if norm is None:
            return torch.ones(width, device=ones.device)
        found = gain_of(norm, ones)
        return found / found.square().mean().sqrt().clamp_min(1e-6)

    head = Head(model)
    is_plain = head.projection is not None and head.projection.weight.shape[1] == width
    last = gain((lambda rows: head.states(rows[0])[None]) if is_plain else None)
    gains = []  # of the first reader of each step
    for parts in steps:
        path = parts[0].branches[0].ops[0].module
        norm = child(layers[parts[0].index], path) if path else None
        gains.append(gain(norm if norm is not None and is_norm(norm) else None))
    metrics = []
    for place in range(1, len(steps) + 1):
        readers = torch.stack([*gains[place : place + READERS], last])
        squares = readers.square().mean(0)  # (hidden,)
        metrics.append(squares / squares.mean())
    return metrics


def gain_of(norm: Callable[[Tensor], Tensor], ones: Tensor) -> Tensor:
    """By what a norm multiplies each channel once it was scaled, with its sign,
    (hidden,), of `ones` (1, 1, hidden).

    On the device of `ones`, wherever the norm's weights are.
    """
    places = torch.arange(ones.shape[-1], device=ones.device)
    # 1 and -1 in turn, of mean 0, as some norms take the mean away
    alternating = 1 - 2 * (places % 2).to(ones)
    up, down = norm(ones * alternating).float(), norm(-ones * alternating).float()
    gain = (up - down)[0, 0] / 2
    return gain.to(ones.device) * alternating.float()


def is_norm(module: nn.Module) -> bool:
    """Whether all its weights are one a channel."""
    return all(parameter.ndim == 1 for parameter in module.parameters())
