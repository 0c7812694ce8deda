"""A model whose checkpoint lacks sublayers, as an export in a form of notall's own does:
what is absent is taken out of the model of the whole config.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import nn
from transformers import PreTrainedModel

from ..errors import UsageError
from ..plan import Fingerprint, Plan
from ..structure.locating import LOCATED, locate
from ..structure.model_structure import (
    ModelStructure,
    text_config,
)
from ..structure.undoing import Undo
from .cutting import MISSING, layers_in, put_layers, refuse_to_save
from .regrouped import regrouped_layer
from .regrouping import Layer
from .skipping import is_skipping


def without(model: PreTrainedModel, missing: Plan) -> ModelStructure:
    """Take out of `model`, in place, the sublayers of `missing`, which its checkpoint
    lacks: numbers stay.
    """
    whole = locate(model)
    dense = layers_in(model, whole)
    missing.check(whole)
    if missing.blocks:
        raise UsageError(
            f"layer {missing.blocks[0]} would have neither an attention nor an MLP"
        )
    blocks = []
    for block in whole.blocks:
        left = tuple(
            part
            for part in block.sublayers
            if block.index not in getattr(missing, part.kind)
        )
        if block.parallel and len(left) < len(block.sublayers):
            raise UsageError(
                "layers whose sublayers run side by side lack none of them alone"
            )
        blocks.append(replace(block, sublayers=left))
    shape = Fingerprint.parse(whole.fingerprint)
    assert shape
    named = replace(shape, model_type=f"notall_{shape.model_type}")
    structure = replace(
        whole, blocks=tuple(blocks), fingerprint=str(named), missing=missing
    )
    layers = nn.ModuleList(
        (
            layer
            if block == before
            else regrouped_layer(
                structure,
                dense,
                Layer(block.index, None, start=block.index, end=block.index + 1),
            )
        )
        for layer, block, before in zip(dense, blocks, whole.blocks)
    )
    put_layers(model, structure, layers, Undo())
    LOCATED[model] = layers, structure
    refusing = partial(refuse_to_save, MISSING)
    model.save_pretrained = refusing  # type: ignore[method-assign]
    kinds = getattr(text_config(model), "layer_types", None) or ["one"] * len(blocks)
    # transformers counts the tokens of a cache by the first layer of each kind
    if not all(
        "attention" in structure.kinds[kinds.index(kind)] for kind in set(kinds)
    ):
        model.register_forward_pre_hook(_refuse_cache, with_kwargs=True)
    return structure


def _refuse_cache(
    model: PreTrainedModel, args: object, arguments: Mapping[str, object]
) -> None:
    held = any(arguments.get(name) is not None for name in ("past_key_values", "cache"))
    if held and not is_skipping(model):
        problem = (
            "transformers counts the tokens of a cache by the first layer, and this"
            " model's has no attention"
        )
        raise UsageError(
            f"{problem}: run it inside `with notall.skip(model, notall.Plan()):`"
        )
