"""A model cut to some of its layers, for a while or for good: its config, their
numbers, and clones of modules.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import Cache, DynamicCache, PretrainedConfig

from .undoing import Undo

Cloned = TypeVar("Cloned", bound=nn.Module)

# What modules call the index of their layer, by which they address the cache.
LAYER_INDICES = ("layer_idx", "layer_id")

# Per-layer lists that a config holds and that caches, masks or layers read while the
# model runs.
PER_LAYER_LISTS = (
    "layer_types",
    "mlp_layer_types",
    "attention_layers",
    "no_rope_layers",
    "layers_block_type",
)


def slice_config(config: PretrainedConfig, layers: Sequence[int]) -> None:
    """Make `config` that of a model of only `layers`, past its setters, which check one
    field against another.
    """
    depth = config.num_hidden_layers
    cut: dict[str, list[object] | tuple[object, ...]] = {}
    for name in (
        PER_LAYER_LISTS
    ):  # that it holds, or derives from a period; not another one's other name
        held = name in config.__dict__ or isinstance(
            getattr(type(config), name, None), property
        )
        values = getattr(config, name) if held else None
        if isinstance(values, list | tuple) and len(values) == depth:
            cut[name] = type(values)(values[index] for index in layers)
    config.__dict__.update(
        (name, values) for name, values in cut.items() if name in config.__dict__
    )
    if listed := config.__dict__.get(
        "attn_layer_indices"
    ):  # from which other lists are derived
        config.__dict__["attn_layer_indices"] = [
            number for number, index in enumerate(layers) if index in listed
        ]
    config.__dict__[
        config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    ] = len(layers)
    underived = {
        name: values for name, values in cut.items() if getattr(config, name) != values
    }
    if underived:
        config.__class__ = _with_lists(type(config), underived)


def free_cache_slots(config: PretrainedConfig, layers: Iterable[int]) -> None:
    """Have caches made from `config` hold nothing for `layers`, as for those that read
    others' keys and values.
    """
    modes = list(
        getattr(config, "kv_sharing_modes", None) or [None] * config.num_hidden_layers
    )
    for index in layers:
        modes[index] = "reuse"
    config.__class__ = _with_lists(type(config), {"kv_sharing_modes": modes})


def count_past_empty_places(config: PretrainedConfig, undo: Undo) -> None:
    """Where the first place of caches made from `config` holds nothing, have caches ask
    the first that does how many tokens they hold, until `undo` is left.

    transformers 5.25 and later ask the first place alone, which then cannot answer.
    """
    first_place = DynamicCache(config=config).layers[:1]
    if not first_place or hasattr(first_place[0], "get_seq_length"):
        return
    length_at = Cache.get_seq_length

    def get_seq_length(cache: Cache, layer_idx: int = 0) -> int:
        if layer_idx == 0:
            counting = (
                index
                for index, place in enumerate(cache.layers)
                if hasattr(place, "get_seq_length")
            )
            layer_idx = next(counting, 0)
        return length_at(cache, layer_idx)

    undo.put(Cache, "get_seq_length", get_seq_length)


def _with_lists(config_class: type, lists: Mapping[str, object]) -> type:
    """A subclass of a config that derives lists from a period: it has these lists of
    its own, as no period gives those of a cut.
    """
    fields = {"__module__": config_class.__module__, "has_own_lists": True, **lists}
    return type(config_class)(config_class.__name__, (config_class,), fields)


def renumber(module: nn.Module, index: int, undo: Undo) -> None:
    """Make `module` and all below it layer `index`, until `undo` is closed."""
    for inner in module.modules():
        for name in LAYER_INDICES:
            if isinstance(inner.__dict__.get(name), int):
                undo.put(inner.__dict__, name, index)


def shallow_clone(
    source: nn.Module,
    children: Mapping[str, nn.Module | None],
    layer_class: type[Cloned],
) -> Cloned:
    """Like `source`, sharing its attributes, parameters and hooks, but of `layer_class`
    and with `children`.
    """
    clone = object.__new__(layer_class)
    clone.__dict__.update(source.__dict__)
    for bound_to_source in (
        "forward",
        "_old_forward",
        "_hf_hook",
    ):  # left by output capturing or by accelerate
        clone.__dict__.pop(bound_to_source, None)
    clone.__dict__["_modules"] = {}
    for name, module in children.items():
        set_child(clone, name, module)
    move_inputs_like(source, clone)
    return clone


def move_inputs_like(source: nn.Module, clone: nn.Module) -> None:
    """Give `clone` the accelerate hook of `source`, if it has one, which moves what
    comes in to its device.
    """
    if "_hf_hook" not in source.__dict__:
        return
    from accelerate.hooks import add_hook_to_module

    hook: Any = copy.copy(source._hf_hook)
    hook.init_hook = lambda module: module  # the weights are placed already
    add_hook_to_module(clone, hook)


def runs_on(module: nn.Module) -> torch.device | None:
    """Where accelerate has a module run, or where its weights are."""
    hook = module.__dict__.get("_hf_hook")
    if (device := getattr(hook, "execution_device", None)) is not None:
        return torch.device(device)
    return next((weight.device for weight in module.parameters()), None)


def set_child(holder: nn.Module, path: str, module: nn.Module | None) -> None:
    """Hang `module` at a dotted `path` below `holder`, with plain modules for what lies
    between.
    """
    *between, name = path.split(".")
    for step in between:
        if step not in holder._modules:
            holder._modules[step] = nn.Module()
        holder = holder._modules[step]  # type: ignore[assignment]
    holder._modules[name] = module
