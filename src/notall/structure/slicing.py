"""Configs and modules of a model cut to some of its layers, for a while or for good."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from transformers import PretrainedConfig

# What modules call the index of their layer, by which they address the cache.
LAYER_INDICES = ("layer_idx", "layer_id")

# Per-layer lists that a config holds and that caches, masks or layers read while the model runs.
PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "attention_layers", "no_rope_layers", "layers_block_type")


@contextmanager
def sliced(config: PretrainedConfig, layers: Sequence[int]) -> Iterator[PretrainedConfig]:
    """`config` as if the model had only `layers`, in that order; as it was when the `with` is left."""
    before = dict(config.__dict__)
    try:
        slice_config(config, layers)
        yield config
    finally:
        config.__dict__.clear()
        config.__dict__.update(before)


def slice_config(config: PretrainedConfig, layers: Sequence[int]) -> None:
    """Make `config` that of a model of only `layers`, past its setters, which check one field against another."""
    count = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    depth = config.num_hidden_layers
    for name in PER_LAYER_LISTS:
        values = config.__dict__.get(name)
        if isinstance(values, list | tuple) and len(values) == depth:
            config.__dict__[name] = type(values)(values[index] for index in layers)
    config.__dict__[count] = len(layers)


@contextmanager
def numbered(module: nn.Module, index: int) -> Iterator[None]:
    """`module` and all below it as layer `index` of its model, for the time of the `with`."""
    before = renumber(module, index)
    try:
        yield
    finally:
        for inner, name, old in before:
            setattr(inner, name, old)


def renumber(module: nn.Module, index: int) -> list[tuple[nn.Module, str, int]]:
    """Make `module` and all below it layer `index`; returns what it was: module, attribute and value."""
    before: list[tuple[nn.Module, str, int]] = []
    for inner in module.modules():
        for name in LAYER_INDICES:
            if isinstance(inner.__dict__.get(name), int):
                before.append((inner, name, inner.__dict__[name]))
                setattr(inner, name, index)
    return before
