"""What a model weighs when a plan is applied: parameters, and bytes of weights, of KV cache and of states."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from ..records.plan import Plan
from ..structure.anatomy import Anatomy, base_model
from ..structure.locating import locate
from ..structure.observation import child
from ..structure.weights import weights_of


@dataclass(frozen=True)
class Footprint:
    """`params` in elements, `weight_bytes` as loaded, scales too, `kv_bytes_per_token` for one sequence.

    What is skipped and others read weighs what it did. `state_bytes` are of the states of fixed size that mixers keep
    for one sequence; None where the model has no such.
    """

    params: int
    weight_bytes: int
    kv_bytes_per_token: int
    state_bytes: int | None = None


def footprint(model: PreTrainedModel, plan: Plan) -> Footprint:
    """What `model` weighs without the sublayers of `plan`. Tied and shared weights count once.

    Works on the meta device too. Raises as `skip` does when the plan does not fit the model.
    """
    inner = base_model(model)
    anatomy = locate(inner)
    plan.check(anatomy)
    layers = list(inner.get_submodule(anatomy.layers).children())
    running = anatomy.running(plan)
    live, dead = _weights(layers, anatomy, running, True), _weights(layers, anatomy, running, False)
    held = [weight for key, weight in weights_of(inner).items() if key not in dead - live]
    kept = [part for part in anatomy.sublayers if part.name in running]
    return Footprint(
        sum(weight.elements for weight in held),
        sum(weight.bytes for weight in held),
        sum(part.kv_bytes_per_token for part in kept),
        sum(part.state_bytes for part in kept) if any(part.state_bytes for part in anatomy.sublayers) else None,
    )


def _weights(layers: list[nn.Module], anatomy: Anatomy, running: frozenset[str], live: bool) -> set[int]:
    """The keys of the weights that sublayers use which run, or do not."""
    parts = [part for part in anatomy.sublayers if (part.name in running) == live]
    modules = (child(layers[part.index], name) for part in parts for name in part.modules)
    return {key for module in modules for key in weights_of(module)}
