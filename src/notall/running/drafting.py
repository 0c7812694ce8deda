"""The skipped model as a second one of the same weights, which drafts what the dense one then checks."""

from __future__ import annotations

import copy

from transformers import PreTrainedModel

from ..errors import UsageError
from ..records.plan import Plan
from ..structure.anatomy import base_model
from .skipping import is_skipping, remove


def draft_model(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """A model without the sublayers of `plan` that shares its weights with `model`, which stays as it is.

    It is for speculative decoding: `model.generate(..., assistant_model=draft_model(model, plan))` says what `model`
    says. Only the weights that a repair brings along are its own. Raises as `remove` does.
    """
    inner = base_model(model)
    if is_skipping(inner):
        raise UsageError("the model is inside a `with notall.skip(...)`; leave it before making a draft model of it")
    shared = {id(tensor): tensor for tensor in (*inner.parameters(), *inner.buffers())}
    draft = copy.deepcopy(inner, shared)
    remove(draft, plan)
    return draft
