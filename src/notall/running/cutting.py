"""Put layers without what a plan skips in the place of a model's own, and have its config
and its caches count them.
"""

from contextlib import suppress
from functools import partial
from itertools import zip_longest
from typing import NoReturn

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import UsageError
from ..plan import Plan
from ..structure.in_place import stubbed_layer
from ..structure.locating import LOCATED
from ..structure.model_structure import (
    ModelStructure,
    text_config,
)
from ..structure.slicing import (
    count_past_empty_places,
    free_cache_slots,
    renumber,
    runs_on,
    slice_config,
)
from ..structure.undoing import ABSENT, Undo
from .prefill import Prompt, declaring, in_prompts
from .regrouped import RegroupedLayer, regrouped_layer
from .regrouping import layers_of
from .repaired import RepairedPlan
from .weight_swaps import placed_at

# Why a model is not saved: a load would fill what it does not find under the names that
# it knows with random weights.
NOT_A_CHECKPOINT = (
    "these layers are ones that a checkpoint cannot hold or tell apart; keep the"
    " original checkpoint"
)
SKIPPED = (
    "leave the `with notall.skip(...)` and save the original model, or write the"
    " smaller one with notall.export"
)
MISSING = (
    "a load would fill what this model lacks with random weights; copy the folder that"
    " it was loaded from"
)


def refuse_to_save(reason: str, *args: object, **kwargs: object) -> NoReturn:
    """Stands in for `save_pretrained`: raises `UsageError`, whatever is asked."""
    raise UsageError(reason)


def are_cut(model: nn.Module, structure: ModelStructure) -> bool:
    """Whether a checkpoint would lack what the architecture has, or have names that it
    does not know.
    """
    return structure.in_place or any(
        isinstance(layer, RegroupedLayer) for layer in layers_in(model, structure)
    )


def is_built_again(model: PreTrainedModel) -> bool:
    """Whether the model's config alone tells how its layers are built, as a load
    must.
    """
    # a config's own lists would not be read from a file
    if "has_own_lists" in vars(type(text_config(model))):
        return False
    try:
        with torch.device("meta"):
            again = type(model)(type(model.config).from_dict(model.config.to_dict()))
    except Exception:  # whatever a config's own checks raise
        return False

    def is_alike(plain: nn.Module, module: nn.Module) -> bool:
        """A quantised projection is of another class, and as wide."""
        is_quantized = getattr(model, "is_quantized", False)
        is_projection = is_quantized and isinstance(plain, nn.Linear)
        if is_projection and type(plain) is not type(module):
            widths = ("in_features", "out_features")
            return all(
                getattr(plain, name) == getattr(module, name, None) for name in widths
            )
        if type(plain).__name__ != type(module).__name__:
            return False
        return _own_shapes(plain) == _own_shapes(module)

    absent = ("", nn.Identity())
    pairs = zip_longest(again.named_modules(), model.named_modules(), fillvalue=absent)
    return all(
        there == here and is_alike(plain, module)
        for (there, plain), (here, module) in pairs
    )


def _own_shapes(module: nn.Module) -> list[torch.Size]:
    """Of its parameters, and none of its children's."""
    return [weight.shape for weight in module.parameters(recurse=False)]


def layers_in(model: nn.Module, structure: ModelStructure) -> nn.ModuleList:
    """The decoder layers of `model` as they are now."""
    return model.get_submodule(structure.layers)  # type: ignore[return-value]


def _place(
    model: PreTrainedModel, structure: ModelStructure
) -> tuple[nn.Module, str, list[PretrainedConfig]]:
    """The module that holds the list of layers, its name there, and the configs that
    say how many there are.
    """
    above, _, name = structure.layers.rpartition(".")
    parent = model.get_submodule(above)
    configs = [text_config(model)]
    own = getattr(parent, "config", None)
    if own is not None and own is not configs[0]:
        configs.append(own)
    return parent, name, configs


def put_layers(
    model: PreTrainedModel, structure: ModelStructure, layers: nn.ModuleList, undo: Undo
) -> None:
    """Have `layers` stand in the place of the model's own, until `undo` is closed."""
    parent, name, _ = _place(model, structure)
    layers.training = parent.training
    undo.put(parent._modules, name, layers)


def apply_plan(
    model: PreTrainedModel, structure: ModelStructure, plan: Plan, undo: Undo
) -> None:
    """Put the regrouped layers in, until `undo` is closed."""
    if not plan and not structure.missing:
        return
    decoder, _, _ = _place(model, structure)
    _install_hooks(decoder)
    # what `generate` keeps between calls counts layers
    undo.put(model.__dict__, "_cache", ABSENT)
    prompt = declaring(model, decoder, plan, undo) if plan.prefill else None
    cut_out(model, structure, plan, undo, prompt=prompt)
    if are_cut(model, structure):
        undo.put(model.__dict__, "save_pretrained", partial(refuse_to_save, SKIPPED))
    undo.put(LOCATED, model, (layers_in(model, structure), structure))


def _install_hooks(decoder: nn.Module) -> None:
    """Hook the layers for `output_hidden_states`, as transformers 5 does once, at the
    first use: inside a `skip` it would hook layers that go when it is left.
    """
    with suppress(ImportError):
        from transformers.utils.output_capturing import maybe_install_capturing_hooks

        if isinstance(decoder, PreTrainedModel):
            maybe_install_capturing_hooks(decoder)


def cut_out(
    model: PreTrainedModel,
    structure: ModelStructure,
    plan: Plan,
    undo: Undo,
    *,
    for_good: bool = False,
    prompt: Prompt | None = None,
) -> None:
    """Make the layers without what `plan` skips the model's own, and have its config
    and its caches count them.

    What it skips in the prompt alone stays in its layers, which ask `prompt` for how
    many tokens it runs.
    """
    dense = layers_in(model, structure)
    _, _, configs = _place(model, structure)
    if isinstance(plan, RepairedPlan):
        plan.check_replaced(model)
        for path, weight in plan.weights.items():
            undo.put(*placed_at(model, path, weight.clone() if for_good else weight))
    # of the weights that are there now
    in_prompt = in_prompts(model, structure, plan, prompt) if prompt else {}
    for config in configs:
        undo.put_fields(config)
    if structure.in_place:
        layers = _stubbed_layers(dense, structure, plan)
        running = structure.running(plan)
        # what is skipped and yet runs is read by other layers, from its cache
        freed = [index for index in plan.attention if f"attn.{index}" not in running]
        for config in configs if freed else ():
            free_cache_slots(config, freed)
    else:
        # into ordinary layers, which `save_pretrained` writes: of no use for a while
        merges = for_good and not structure.scaled
        groups = layers_of(
            structure, plan, lambda i, j: merges and _are_alike(dense[i], dense[j])
        )
        layers = [
            regrouped_layer(structure, dense, group, in_prompt) for group in groups
        ]
        for config in configs:
            slice_config(config, [group.attention for group in groups])
        for index, layer in enumerate(layers):
            renumber(layer, index, undo)
    count_past_empty_places(text_config(model), undo)
    put_layers(model, structure, nn.ModuleList(layers), undo)


def _stubbed_layers(
    dense: nn.ModuleList, structure: ModelStructure, plan: Plan
) -> list[nn.Module]:
    """The layers with stubs for what `plan` skips, or silenced where others read it;
    a layer of which nothing is skipped is the original one.
    """
    running = structure.running(plan)
    layers: list[nn.Module] = []
    for layer, block in zip(dense, structure.blocks):
        skipped = [
            part for part in block.sublayers if block.index in getattr(plan, part.kind)
        ]
        # times zero where it runs for others, None where it doesn't run
        scales = {
            part.stub: torch.zeros_like if part.name in running else None
            for part in skipped
            if part.stub
        }
        layers.append(stubbed_layer(layer, block.index, scales) if scales else layer)
    return layers


def _are_alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether a sublayer of one layer can be the other's own: of one class, on one
    device.
    """
    return type(one) is type(other) and runs_on(one) == runs_on(other)
