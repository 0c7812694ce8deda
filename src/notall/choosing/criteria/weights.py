"""By the weights alone, without a text."""

from __future__ import annotations

from torch import Tensor, nn

from ...errors import UsageError
from ...structure.anatomy import base_model
from .setting import Setting, UnitScores


def score_gate_norm(setting: Setting) -> UnitScores:
    """|W_Q W_K^T|, the Frobenius norm: the attentions whose queries and keys are least coupled go first.

    Keys that a group of query heads share are repeated for each. Source: Gate-Norm, arXiv 2512.20636. Raises
    `UsageError` for other kinds than attention, and for attentions without separate query and key projections.
    """
    space = setting.space
    if space.unit_kind != "attention":
        raise UsageError("Gate-Norm ranks attentions only: choose among attentions")
    model = base_model(setting.model)
    layers = list(model.get_submodule(space.anatomy.layers).children())
    return {(name,): _coupling(layers[int(name.partition(".")[2])]) for name in space.names}


def has_projections(layer: nn.Module) -> bool:
    """Whether a layer has the queries' and the keys' projections apart."""
    names = {path.rpartition(".")[2] for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
    return {"q_proj", "k_proj"} <= names


def _coupling(layer: nn.Module) -> float:
    queries, keys = (_projection(layer, name) for name in ("q_proj", "k_proj"))
    heads = len(queries) // len(keys)
    if heads > 1:
        width: int = next(m.head_dim for m in layer.modules() if isinstance(getattr(m, "head_dim", None), int))  # type: ignore[assignment]
        keys = keys.view(-1, width, keys.shape[-1]).repeat_interleave(heads, dim=0).flatten(0, 1)
    return float((queries.T @ keys).norm())  # (hidden, hidden)


def _projection(layer: nn.Module, name: str) -> Tensor:
    """The weight of a projection, (heads * width, hidden)."""
    for path, module in layer.named_modules():
        if path.rpartition(".")[2] == name and isinstance(module, nn.Linear):
            return module.weight.detach().float()
    raise UsageError(
        f"Gate-Norm needs separate query and key projections, and {type(layer).__name__} has no {name}; "
        "take another criterion"
    )
