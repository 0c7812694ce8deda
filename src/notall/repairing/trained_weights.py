"""The weights that a recovery fine-tuning trains: which ones, and LoRA matrices."""

import re
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModel, UsageError, shortened
from ..plan import Plan
from ..running.generating import seeded
from ..running.steps import live_steps
from ..structure.locating import locate
from ..structure.model_structure import Sublayer
from .projections import Projections, is_matrix, is_norm
from .train_config import Trained

ADAPTER_NAME = "healing"  # peft's name of the matrices


def chosen_paths(
    model: PreTrainedModel, plan: Plan, train: Trained, tokens: Tensor
) -> Iterator[str]:
    """The paths to train of what is kept: of all parameters, of norms and output
    projections, or (LoRA) of matrices.
    """
    projections = Projections(model, tokens)
    structure = locate(model)
    for block, parts in live_steps(structure, plan):
        path = f"{structure.layers}.{block.index}"
        layer = model.get_submodule(path)
        for part in parts:
            if train == "lora":
                names = _matrices(layer, part, projections)
            else:
                modules = _modules(layer, part, projections, train)
                names = _parameters(layer, modules, projections)
            yield from (f"{path}.{name}" for name in names)


def _matrices(
    layer: nn.Module, part: Sublayer, projections: Projections
) -> Iterator[str]:
    """The modules of a sublayer that are matrices, but for those that layers share."""
    for top in part.modules:
        for name, module in layer.get_submodule(top).named_modules(prefix=top):
            if is_matrix(module) and id(module.weight) not in projections.shared:
                yield name


def _modules(
    layer: nn.Module, part: Sublayer, projections: Projections, train: Trained
) -> list[str]:
    """The modules of a sublayer whose parameters are trained."""
    if train == "all":
        return list(part.modules)
    names = [name for name in part.modules if is_norm(layer.get_submodule(name))]
    last = projections.of(part)
    return [*names, last.path] if last else names


def _parameters(
    layer: nn.Module, modules: list[str], projections: Projections
) -> Iterator[str]:
    """The parameters of these modules, but for those that layers share."""
    starts = tuple(f"{name}." for name in modules)
    for name, parameter in layer.named_parameters():
        if name.startswith(starts) and id(parameter) not in projections.shared:
            yield name


def adapted(
    layers: nn.Module, where: str, paths: set[str], rank: int
) -> dict[str, Any]:
    """Add LoRA matrices, whose product is zero at first, to those at `paths`; peft's
    layers by these paths.

    `where` is the beginning of each path, up to the layers. Given the whole model, peft
    would take the name of a dense MLP for that of experts, as checkpoints of
    transformers 4 have it.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UsageError(
            "training LoRA matrices needs peft: pip install 'notall[lora]'"
        ) from None

    below = {path: path.removeprefix(where) for path in sorted(paths)}
    names = "|".join(map(re.escape, below.values()))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
    try:
        with warnings.catch_warnings(), seeded(0):
            warnings.simplefilter("ignore")  # it sets by itself what it warns of
            inject_adapter_in_model(config, layers, ADAPTER_NAME)
    except ValueError as error:
        raise UnsupportedModel(
            f"peft refuses this model ({shortened(error)}); train something else than"
            " lora"
        ) from None
    return {path: layers.get_submodule(name) for path, name in below.items()}
