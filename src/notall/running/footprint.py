"""What a model weighs when a plan is applied: parameters, and bytes of weights, of KV cache and of states."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from ..records.plan import Plan
from ..structure.anatomy import Block, base_model
from ..structure.locating import locate
from ..structure.observation import child
from ..structure.weights import weights_of


@dataclass(frozen=True)
class Footprint:
    """`params` in elements, `weight_bytes` as loaded, scales too, `kv_bytes_per_token` for one sequence.

    `state_bytes` are of the states of fixed size that mixers keep for one sequence; None where the model has no such.
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
    dead = {key for block in anatomy.blocks for key in _dead(layers[block.index], block, plan)}
    live = [weight for key, weight in weights_of(inner).items() if key not in dead]
    kept = [part for part in anatomy.sublayers if part.index not in getattr(plan, part.kind)]
    return Footprint(
        sum(weight.elements for weight in live),
        sum(weight.bytes for weight in live),
        sum(part.kv_bytes_per_token for part in kept),
        sum(part.state_bytes for part in kept) if any(part.state_bytes for part in anatomy.sublayers) else None,
    )


def _dead(layer: nn.Module, block: Block, plan: Plan) -> list[int]:
    """The keys of the weights of a layer that only skipped sublayers use."""
    skipped = {part.kind for part in block.sublayers if block.index in getattr(plan, part.kind)}
    needed = {name for part in block.sublayers if part.kind not in skipped for name in part.modules}
    unneeded = {name for part in block.sublayers for name in part.modules} - needed
    return [key for name in unneeded for key in weights_of(child(layer, name))]
