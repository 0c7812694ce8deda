"""A repaired plan's weights in the place of a model's own: where each belongs, in which
dtype, and whether it was made for this model.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UsageError
from ..structure.calls import child
from ..structure.key_values import is_projection, matrix_of
from ..structure.model_structure import text_config
from ..structure.undoing import Undo

# of a path, behind a module of the MLP that it stands in for
STAND_IN = "stand_in"
SAMPLE = 16  # numbers of a weight that tell it from another model's


@contextmanager
def with_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Have `module` run with these values of parameters, by their paths below it; then
    with its very own again.
    """
    with Undo() as undo, undo:
        for path, weight in weights.items():
            undo.put(*placed_at(module, path, weight))
        yield


@contextmanager
def with_modules(holder: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Have `holder` run with these modules, by their paths below it; then with its very
    own again.
    """
    with Undo() as undo, undo:
        for path, module in modules.items():
            above, _, name = path.rpartition(".")
            undo.put(child(holder, above)._modules, name, module)
        yield


def placed_at(
    module: nn.Module, path: str, weight: Tensor
) -> tuple[dict[str, nn.Parameter | None], str, nn.Parameter]:
    """Where the parameter at `path` is held, its name there, and `weight` for it, on
    its device and in its dtype: what `Undo.put` is given.

    Raises `UsageError` where the model has no such parameter, one of another shape, or
    an offloaded one.
    """
    above, _, name = path.rpartition(".")
    try:
        holder = module.get_submodule(above)
        own = holder.get_parameter(name)
    except AttributeError:
        raise UsageError(
            f"the model has no {path}, which the plan has weights for; repair this"
            " model"
        ) from None
    if own.shape != weight.shape:
        raise UsageError(
            f"the repaired {path} is {tuple(weight.shape)}, but the model's is"
            f" {tuple(own.shape)}; repair this model"
        )
    if own.device.type == "meta":
        raise UsageError(
            f"{path} is offloaded, and repaired weights cannot take its place there;"
            " load the model whole"
        )
    value = weight.to(own.device, own.dtype)
    placed = nn.Parameter(value, requires_grad=own.requires_grad)
    return holder._parameters, name, placed


def placed_in_prompt(model: nn.Module, path: str, weight: Tensor) -> Tensor:
    """A weight of the prompt, in the dtype and on the device of the projection that it
    stands in for.

    `weight` is (rows, inputs) for a path that ends in `weight`, and (rows,) for one
    that ends in `bias`, also where the projection has no bias: the rows that keys and
    values need of it. Raises `UsageError` for a misfit.
    """
    above, _, name = path.rpartition(".")
    if above.endswith(f".{STAND_IN}"):
        return _placed_stand_in(model, path, weight)
    try:
        holder = model.get_submodule(above)
    except AttributeError:
        holder = model
    if name not in ("weight", "bias") or not is_projection(holder):
        raise UsageError(
            f"the model has no {path}, which the plan has weights of the prompt for;"
            " repair this model"
        )
    own = matrix_of(holder)  # (outputs, inputs)
    row_shape = own.shape[1:] if name == "weight" else torch.Size()
    fits = weight.dim() == 1 + len(row_shape) and weight.shape[1:] == row_shape
    if not fits or len(weight) > len(own):
        raise UsageError(
            f"the prompt's {path} is {tuple(weight.shape)}, but the model's matrix is"
            f" {tuple(own.shape)}; repair this model"
        )
    return weight if own.device.type == "meta" else weight.to(own.device, own.dtype)


def _placed_stand_in(model: nn.Module, path: str, weight: Tensor) -> Tensor:
    """The same for what stands in for an MLP: (hidden, hidden), or a bias, (hidden,)."""
    assert isinstance(model, PreTrainedModel)
    above, _, name = path.rpartition(f".{STAND_IN}.")
    try:
        like = next(model.get_submodule(above).parameters())
    except (AttributeError, StopIteration):
        raise UsageError(
            f"the model has no {above}, which the plan stands in for in the prompt;"
            " repair this model"
        ) from None
    width = text_config(model).hidden_size
    shape = {"weight": (width, width), "bias": (width,)}.get(name)
    if weight.shape != shape:
        raise UsageError(
            f"the prompt's {path} is {tuple(weight.shape)}, but the model's stream has"
            f" {width} features; repair this model"
        )
    return weight if like.device.type == "meta" else weight.to(like.device, like.dtype)


def samples(
    own: nn.Module | Mapping[str, Tensor], paths: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    """A few numbers of each weight, where it is there and plain: a quantised one has
    none of its own.
    """
    weights = dict(own.named_parameters()) if isinstance(own, nn.Module) else own
    for path in paths:
        weight = weights.get(path)
        if weight is None or weight.device.type == "meta":
            continue
        if type(weight.data) is Tensor:
            flat = weight.detach().flatten()
            every = math.ceil(len(flat) / SAMPLE)
            yield path, flat[::every].cpu().clone()  # (at most SAMPLE,)
