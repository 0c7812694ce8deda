"""What a model weighs when a plan is applied: parameters, and bytes of weights, of KV cache and of states."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..plan import Plan
from ..results.facts import Footprint
from ..structure.locating import locate
from ..structure.model_structure import ModelStructure, base_model
from ..structure.observation import child
from ..structure.weights import weights_of


def footprint(model: PreTrainedModel, plan: Plan) -> Footprint:
    """What `model` weighs without the sublayers of `plan`. Tied and shared weights count once.

    Works on the meta device too. Raises as `skip` does when the plan does not fit the model.
    """
    inner = base_model(model)
    structure = locate(inner)
    plan.check(structure)
    layers = list(inner.get_submodule(structure.layers).children())
    running = structure.running(plan)
    live, dead = _weights(layers, structure, running, True), _weights(layers, structure, running, False)
    held = [weight for key, weight in weights_of(inner).items() if key not in dead - live]
    kept = [part for part in structure.sublayers if part.name in running]
    return Footprint(
        params=sum(weight.elements for weight in held),
        weight_bytes=sum(weight.bytes for weight in held),
        kv_bytes_per_token=sum(part.kv_bytes_per_token for part in kept),
        state_bytes=sum(part.state_bytes for part in kept)
        if any(part.state_bytes for part in structure.sublayers)
        else None,
    )


def _weights(layers: list[nn.Module], structure: ModelStructure, running: frozenset[str], live: bool) -> set[int]:
    """The keys of the weights that sublayers use which run, or do not."""
    parts = [part for part in structure.sublayers if (part.name in running) == live]
    modules = (child(layers[part.index], name) for part in parts for name in part.modules)
    return {key for module in modules for key in weights_of(module)}
