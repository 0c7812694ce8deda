"""Modules like others, that share their weights, but have other children."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn


def twin_of(source: nn.Module, children: Mapping[str, nn.Module], layer_class: type[nn.Module]) -> nn.Module:
    """Like `source`, sharing its attributes, parameters and hooks, but of `layer_class` and with `children`."""
    twin = object.__new__(layer_class)
    twin.__dict__.update(source.__dict__)
    for bound_to_source in ("forward", "_old_forward", "_hf_hook"):  # left by output capturing or by accelerate
        twin.__dict__.pop(bound_to_source, None)
    twin.__dict__["_modules"] = {}
    for name, module in children.items():
        set_child(twin, name, module)
    if "_hf_hook" in source.__dict__:
        move_inputs_like(source, twin)
    return twin


def move_inputs_like(source: nn.Module, twin: nn.Module) -> None:
    """Give `twin` the accelerate hook of `source`, which moves what comes in to the layer's device."""
    from accelerate.hooks import add_hook_to_module

    hook: Any = copy.copy(source._hf_hook)
    hook.init_hook = lambda module: module  # the weights are placed already
    add_hook_to_module(twin, hook)


def set_child(holder: nn.Module, path: str, module: nn.Module) -> None:
    """Hang `module` at a dotted `path` below `holder`, with plain modules for what lies between."""
    *between, name = path.split(".")
    for step in between:
        if step not in holder._modules:
            holder._modules[step] = nn.Module()
        holder = holder._modules[step]  # type: ignore[assignment]
    holder._modules[name] = module
