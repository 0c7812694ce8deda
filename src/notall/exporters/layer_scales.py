"""Models whose layers multiply their stream: the scales of an export's layers, and what
is divided by those of layers that were cut.
"""

import copy
import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..errors import UsageError
from ..running.regrouping import Layer, folded
from ..structure.model_structure import Sublayer
from .dense import DenseModel
from .tensors import FLOATS, Weight


def folded_scales(
    dense: DenseModel, layers: Sequence[Layer]
) -> Iterator[tuple[str, Weight]]:
    """The scale of each layer of the export, and the weights that change for those that
    are gone, by their new names. None where the model has no scales.

    Raises `UsageError` where what a sublayer adds can't be divided by its weights.
    """
    if not dense.structure.scaled:
        return
    blocks = dense.structure.blocks
    scales = [_scale(dense, index) for index in range(len(blocks))]
    for number, (layer, scale) in enumerate(zip(layers, folded(layers, scales))):
        start = f"{dense.prefix}{number}."
        block = blocks[layer.attention]
        if scale.attention != 1:
            yield from _divided(dense, block.attention, scale.attention, start)
        if scale.mlp != 1:
            mlp = blocks[layer.attention if layer.mlp is None else layer.mlp].mlp
            yield from _divided(dense, mlp, scale.mlp, start)
        if block.scaled_by:
            stored = dense.layers[layer.attention][block.scaled_by]
            whole = torch.full(stored.shape, scale.whole, dtype=torch.float64)
            yield start + block.scaled_by, stored.holding(whole)


def _scale(dense: DenseModel, index: int) -> float:
    """What a layer multiplies its stream by in the end."""
    name = dense.structure.blocks[index].scaled_by
    if name is None:
        return 1.0
    stored = dense.layers[index].get(name)
    scale = math.nan
    if stored is not None and stored.dtype in FLOATS:
        scale = float(stored.read().double().sum())  # of one number, in any shape
    if not 0 < abs(scale) < math.inf:
        raise UsageError(
            f"files of {dense.origin.model} have {scale} for {name} of layer {index};"
            " download them again"
        )
    return scale


def _divided(
    dense: DenseModel, part: Sublayer, by: float, start: str
) -> Iterator[tuple[str, Weight]]:
    """The weights of a sublayer's last module, divided, so that it adds so many times
    less to the stream.
    """
    last = (part.stub or part.branches[0]).modules[-1]
    module = dense.layer(part.index).get_submodule(last)
    if not is_divided_by_weights(module):
        raise UsageError(
            f"layers of {dense.structure.model_type} multiply their stream, and what"
            f" {part.name} adds cannot be divided by what is cut before it; keep the"
            " layer before it whole, or skip in memory"
        )
    for name, stored in dense.parts(part).items():
        if name.startswith(f"{last}."):
            yield start + name, stored.changed(lambda values: values.double() / by)


@torch.no_grad()
def is_divided_by_weights(module: nn.Module) -> bool:
    """Whether a module's output is half as large with weights that are: tried on random
    ones.
    """
    trial = copy.deepcopy(module).to_empty(device="cpu").double()
    weights = list(trial.parameters())
    for weight in weights:
        draw = torch.Generator().manual_seed(0)
        weight.copy_(torch.rand(weight.shape, generator=draw) + 0.5)
    width = weights[0].shape[-1] if weights else 1
    draw = torch.Generator().manual_seed(1)
    states = torch.randn(1, 3, width, generator=draw, dtype=torch.float64)
    try:
        before = trial(states)
        for weight in weights:
            weight.div_(2)
        return torch.allclose(trial(states), before / 2, rtol=1e-5)
    except Exception:  # whatever a module raises that takes or answers something else
        return False
