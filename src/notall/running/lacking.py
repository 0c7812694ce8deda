"""Models whose layers lack a sublayer each, as exports hold them: built whole, then without what is not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedModel

from ..errors import UsageError
from ..records.fingerprint import Fingerprint
from ..records.plan import Plan
from ..structure import locating
from ..structure.anatomy import Anatomy, Block, text_config
from ..structure.locating import locate
from .regrouping import Group
from .skipping import is_skipping, regrouped_layer


def without(model: PreTrainedModel, lacking: Plan) -> Anatomy:
    """Take out of `model`, in place, the sublayers of `lacking`, which its checkpoint does not have.

    Unlike after `remove`, every layer keeps its number, and `locate`, `skip` and whatever goes by them take the model
    as it is. Raises `UsageError` where a layer would be left with nothing.
    """
    whole = locate(model)
    lacking.check(whole)
    if lacking.blocks:
        raise UsageError(f"layer {lacking.blocks[0]} would have neither an attention nor an MLP")
    blocks = tuple(_left(block, lacking) for block in whole.blocks)
    shape = Fingerprint.parse(whole.fingerprint)
    assert shape
    named = replace(shape, model_type=f"notall_{shape.model_type}")
    anatomy = replace(whole, blocks=blocks, fingerprint=str(named), lacking=lacking)
    parent = model.get_submodule(whole.layers.rpartition(".")[0])
    layers = nn.ModuleList(
        layer
        if block == before
        else regrouped_layer(anatomy, dense, Group(block.index, whole=False, start=block.index, end=block.index + 1))
        for dense in [model.get_submodule(whole.layers)]
        for layer, block, before in zip(dense, blocks, whole.blocks)
    )
    layers.training = parent.training
    parent._modules[whole.layers.rpartition(".")[2]] = layers
    locating.remember(model, layers, anatomy)
    model.save_pretrained = _refuse_to_save
    if not _counts_right(model, anatomy):
        model.register_forward_pre_hook(_refuse_cache, with_kwargs=True)
    return anatomy


def _left(block: Block, lacking: Plan) -> Block:
    left = tuple(part for part in block.sublayers if block.index not in getattr(lacking, part.kind))
    if block.parallel and len(left) < len(block.sublayers):
        raise UsageError("layers whose sublayers run side by side lack none of them alone")
    return replace(block, sublayers=left)


def _counts_right(model: PreTrainedModel, anatomy: Anatomy) -> bool:
    """Whether transformers counts the tokens of a cache right: it asks the first layer of each kind."""
    kinds = getattr(text_config(model), "layer_types", None) or ["one"] * len(anatomy.blocks)
    return all("attention" in anatomy.kinds[kinds.index(kind)] for kind in set(kinds))


def _refuse_to_save(*args: object, **kwargs: object) -> NoReturn:
    raise UsageError(
        "a load would fill what this model lacks with random weights; copy the folder that it was loaded from, or "
        "export the dense model with the plan that you want"
    )


def _refuse_cache(model: PreTrainedModel, args: Any, arguments: Mapping[str, Any]) -> None:
    held = any(arguments.get(name) is not None for name in ("past_key_values", "cache"))
    if held and not is_skipping(model):
        raise UsageError(
            "transformers counts the tokens of a cache by the first layer, and this model's has no attention: run it "
            "inside `with notall.skip(model, notall.Plan()):`"
        )
