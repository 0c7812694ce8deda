"""What the tests say by hand of the hybrid families is so: without `notall`, for its tests lean on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from families import TRANSFORMERS_5, Family, family, silenced, stack_of
from hybrid_families import HYBRIDS, OTHERS

pytestmark = pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4.57 keeps the states of hybrids elsewhere")

TOKENS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
COUNT_FROM_THE_CACHE_ONLY_IF_TOLD = {"bamba"}  # without `position_ids`, each token is their first
ANSWER_NO_CACHE = {"recurrent_gemma"}
KEEP_NOTHING = {"openai-gpt"}


@pytest.fixture(params=[*HYBRIDS, *OTHERS], ids=str)
def hybrid(request: pytest.FixtureRequest) -> Family:
    if not request.param.exists:
        pytest.skip(f"this transformers has no {request.param.model_type}")
    return request.param


def sublayers(family: Family) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each alone, as the attentions and MLPs that `silenced` takes."""
    attentions = [((i,), ()) for i in range(family.depth) if i not in family.only_mlp]
    mlps: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
        ((), (i,)) for i in range(family.depth) if i not in family.only_attention
    ]
    return attentions + mlps


def test_is_found_by_name(hybrid: Family) -> None:
    assert family(hybrid.name) is hybrid


@torch.no_grad()
def test_every_sublayer_matters(hybrid: Family) -> None:
    model = hybrid.build()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert len(stack_of(model)) == hybrid.depth
    dense = uncached(model)
    assert dense.isfinite().all()
    for attention, mlp in sublayers(hybrid):
        with silenced(model, hybrid, attention, mlp):
            moved = difference(uncached(model), dense)
        assert moved > 1e-3, f"attention {attention}, MLP {mlp}: moved by {moved}"


@torch.no_grad()
def test_token_by_token_is_all_at_once(hybrid: Family) -> None:
    if hybrid.name in KEEP_NOTHING:
        pytest.skip("has no cache")
    model = hybrid.build()
    dense = uncached(model)
    same = difference(cached(model), dense) < 1e-4
    assert same == (hybrid.name not in COUNT_FROM_THE_CACHE_ONLY_IF_TOLD)
    assert same or difference(cached(model, told=True), dense) < 1e-4


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, as part of the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def uncached(model: PreTrainedModel) -> Tensor:
    return model(TOKENS, use_cache=False).logits


def cached(model: PreTrainedModel, told: bool = False) -> Tensor:
    """Token by token; `told` the position of each."""
    cache = DynamicCache(config=model.config) if model.config.model_type in ANSWER_NO_CACHE else None
    logits = []
    for position, token in enumerate(TOKENS.split(1, dim=1)):
        where = {"position_ids": torch.full_like(token, position)} if told else {}
        output = model(token, use_cache=True, cache=cache, **where)
        cache = output.get("cache", cache)
        logits.append(output.logits)
    return torch.cat(logits, 1)
