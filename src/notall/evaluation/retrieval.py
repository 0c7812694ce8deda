"""Whether a hybrid that lost attentions still finds what was said far back, which perplexity does not see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..records.columns import Row
from ..records.plan import Plan
from ..structure.anatomy import Anatomy
from .battery import CONTEXTS, check_passkey


def may_lose_retrieval(anatomy: Anatomy, plan: Plan) -> bool:
    """Whether `plan` takes an attention with keys and values from a model whose other mixers keep states alone.

    Such attentions are few, and states of fixed size do not hold a fact word for word.
    """
    has_states = any(part.state_bytes and not part.kv_bytes_per_token for part in anatomy.sublayers)
    return has_states and any(part.kv_bytes_per_token and part.index in plan.attention for part in anatomy.sublayers)


def look_far_back(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plans: Mapping[str, Plan],
    windows: Sequence[Tensor],
    *,
    seed: int = 0,
) -> list[Row]:
    """A row for each plan and context length: the share of numbers that are found again, beside the dense model's.

    `windows` are the haystack, token ids, (batch, tokens) each. Five numbers a length.
    """
    checks = check_passkey(model, tokenizer, list(plans.values()), windows, CONTEXTS, seed=seed)
    return [
        asdict(check) | {"model": [*plans][check.plan], "dense": check.value - check.delta, "worse": check.worse}
        for check in checks
    ]
