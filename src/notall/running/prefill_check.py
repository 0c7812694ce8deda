"""Whether a sublayer can be skipped in the prompt alone: each is run whole and for the
last tokens alone, once for a model, and both have to agree.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from ..errors import UnsupportedModel
from ..structure.branches import run_branches
from ..structure.calls import LayerCall, child
from ..structure.key_values import (
    CacheSlot,
    key_value_rows,
    writer_of,
)
from ..structure.model_structure import (
    ModelStructure,
    Sublayer,
    inputs_device,
    text_config,
)
from ..structure.proving import relative_error, tolerance
from .last_tokens import run_last

CANNOT = (
    "cannot be skipped in the prompt alone: its keys and values cannot be written"
    " without the rest of it"
)
FIX = "skip it for every token, or take it out of the plan"
PROBE_TOKENS, PROBE_LAST = 7, 3  # of the check: no size of a model's that a test has


WrittenRows = dict[str, dict[str, Tensor]]  # by sublayer, what `key_value_rows` returns
_CHECKED: WeakKeyDictionary[nn.Module, tuple[ModelStructure, WrittenRows]] = (
    WeakKeyDictionary()
)


def checked_rows(
    model: PreTrainedModel, structure: ModelStructure, parts: Sequence[Sublayer]
) -> WrittenRows:
    """For each attention among `parts` its `key_value_rows`, once each was seen to run
    for the last tokens alone.
    """
    known = _CHECKED.get(model)
    rows = known[1] if known and known[0] is structure else {}
    _CHECKED[model] = structure, rows
    new = [part for part in parts if part.name not in rows]
    if not new:
        return rows
    from .recording import record

    layers = model.get_submodule(structure.layers)
    with (
        torch.inference_mode(False),
        torch.no_grad(),
    ):  # gradients find what keys and values need
        ids = torch.arange(2 * PROBE_TOKENS, device=inputs_device(model)).view(
            2, PROBE_TOKENS
        )
        padded = torch.ones_like(ids)
        padded[0, 0] = 0
        recordings = [
            record(
                model,
                input_ids=ids % text_config(model).vocab_size,
                attention_mask=mask,
            )
            for mask in (padded, torch.ones_like(ids))
        ]
        for part in new:
            layer = child(layers, str(part.index))
            for recording in recordings:
                call = LayerCall(recording.arguments[part.index])
                embedded = recording.embedded.to(recording.devices[part.index])
                rows[part.name] = _check(
                    part, layer, embedded, call, text_config(model)
                )
    return rows


def _check(
    part: Sublayer,
    layer: nn.Module,
    hidden: Tensor,
    call: LayerCall,
    config: PretrainedConfig,
) -> dict[str, Tensor]:
    """Run a sublayer whole and for the last tokens alone, (batch, tokens, hidden): both
    and their caches agree.

    Raises `UnsupportedModel` where they don't. Returns the `key_value_rows` of an
    attention.
    """
    rows: dict[str, Tensor] = {}
    caches = [DynamicCache(config=config) for _ in range(2)]
    total = hidden
    try:
        slot = CacheSlot.of(call.arguments)
        calls = [
            LayerCall(call.arguments | {slot.name: cache}, call.extras)
            for cache in caches
        ]
        for branch in part.branches:
            if branch.is_attention:
                rows |= key_value_rows(branch, layer, hidden, call)
                writer = writer_of(layer, branch, rows, {})
            total = run_last(
                branch,
                layer,
                hidden,
                total,
                calls[0],
                PROBE_LAST,
                writer if branch.is_attention else None,
            )
        expected = run_branches(part.branches, layer, hidden, calls[1])
    except UnsupportedModel:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UnsupportedModel(f"{part.name} {CANNOT} ({reason}); {FIX}") from error
    errors = [relative_error(total[:, -PROBE_LAST:], expected[:, -PROBE_LAST:])]
    pairs = zip(*(cached_tensors_of(cache) for cache in caches))
    errors += [relative_error(found, wanted) for found, wanted in pairs]
    if not max(errors) <= tolerance(hidden.dtype):
        found = f"with them it differs by {max(errors):.1e} of its largest value"
        raise UnsupportedModel(f"{part.name} {CANNOT} ({found}); {FIX}")
    return rows


def cached_tensors_of(cache: DynamicCache) -> list[Tensor]:
    """The keys and values that it holds."""
    pairs = [
        (getattr(layer, "keys", None), getattr(layer, "values", None))
        for layer in cache.layers
    ]
    return [one for pair in pairs for one in pair if one is not None]
