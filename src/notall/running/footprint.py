"""What a model weighs when a plan is applied: parameters, and bytes of weights, of KV cache and of states."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..plan import Plan
from ..results.facts import Footprint
from ..structure.locating import locate
from ..structure.model_structure import base_model
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
    names = structure.running(plan)
    kept = [part for part in structure.sublayers if part.name in names]
    live, dead = (
        {key for part in parts for name in part.modules for key in weights_of(child(layers[part.index], name))}
        for parts in (kept, [part for part in structure.sublayers if part.name not in names])
    )
    held = [weight for key, weight in weights_of(inner).items() if key not in dead - live]
    has_states = any(part.state_bytes for part in structure.sublayers)
    return Footprint(
        params=sum(weight.elements for weight in held),
        weight_bytes=sum(weight.bytes for weight in held),
        kv_bytes_per_token=sum(part.kv_bytes_per_token for part in kept),
        state_bytes=sum(part.state_bytes for part in kept) if has_states else None,
    )
