"""What is said by hand of the hybrid and plain families is so: without `notall`, whose
tests lean on it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from families import TRANSFORMERS, TRANSFORMERS_5, Family, family, silenced, stack_of
from hybrid_families import HYBRIDS
from plain_families import NORMED_AFTER, OTHERS

pytestmark = [
    # of transformers alone: what changes nothing here leaves them as they are
    pytest.mark.slow,
    pytest.mark.skipif(
        not TRANSFORMERS_5,
        reason="transformers 4.57 keeps the states of hybrids elsewhere",
    ),
]

TOKENS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
COUNT_FROM_THE_CACHE_ONLY_IF_TOLD = {
    "bamba"
}  # without `position_ids`, each token is their first
ANSWER_NO_CACHE = {"recurrent_gemma"}
KEEP_NOTHING = {"openai-gpt"}
# 5.25 asks the cache's first place for the length, where a recurrent layer keeps none: the
# mask is then of no token before. `notall` refuses this family.
DECODES_WRONG = {"recurrent_gemma"} if TRANSFORMERS >= (5, 25) else set()
# Their layers scale, norm or mix the stream, or begin another, even if nothing is added
# to it.
CHANGE_THE_STREAM = {family.name for family in NORMED_AFTER if not family.whole} | {
    *(
        "beam",
        "deepseek_v4",
        "doge",
        "ergo",
        "gemma3n_text",
        "gemma4_text",
        "gemma4_text (experts)",
        "gemma4_unified_text",
    ),
    "gemma4 (text part)",
    "gemma4_text (nothing shared)",
    *("inkling2_text", "inkling2_loop_text", "minimax", "zaya"),
}


@pytest.fixture(params=[*HYBRIDS, *OTHERS, *NORMED_AFTER], ids=str)
def hybrid(request: pytest.FixtureRequest) -> Family:
    if not request.param.exists:
        pytest.skip(f"this transformers has no {request.param.model_type}")
    return request.param


Silent = tuple[
    tuple[int, ...], tuple[int, ...]
]  # attentions and MLPs, as `silenced` takes them


def every_sublayer(family: Family) -> Silent:
    layers = range(family.depth)
    attentions = tuple(i for i in layers if i not in family.only_mlp)
    return attentions, tuple(i for i in layers if i not in family.only_attention)


def single_sublayers(family: Family) -> list[Silent]:
    attentions, mlps = every_sublayer(family)
    return [((i,), ()) for i in attentions] + [((), (i,)) for i in mlps]


def test_is_found_by_name(hybrid: Family) -> None:
    assert family(hybrid.name) is hybrid


@torch.no_grad()
def test_every_sublayer_matters(hybrid: Family) -> None:
    model = hybrid.build()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert len(stack_of(model)) == hybrid.depth
    dense = uncached(model)
    assert dense.isfinite().all()
    for attention, mlp in single_sublayers(hybrid):
        with silenced(model, hybrid, attention, mlp):
            moved = difference(uncached(model), dense)
        assert moved > 1e-3, f"attention {attention}, MLP {mlp}: moved by {moved}"


@torch.no_grad()
def test_layers_add_nothing_but_what_is_named(hybrid: Family) -> None:
    model = hybrid.build()
    unchanged = []

    def compare(layer: nn.Module, args: tuple[Tensor, ...], answer: Any) -> None:
        unchanged.append(
            torch.equal(args[0], answer if isinstance(answer, Tensor) else answer[0])
        )

    with silenced(model, hybrid, *every_sublayer(hybrid)):
        for layer in stack_of(model):
            layer.register_forward_hook(compare)
        uncached(model)
    assert len(unchanged) >= hybrid.depth
    assert all(unchanged) == (hybrid.name not in CHANGE_THE_STREAM)


@torch.no_grad()
def test_tokens_meet_only_where_it_is_said(hybrid: Family) -> None:
    model = hybrid.build()
    other = torch.cat([(TOKENS[:, :1] + 1) % 99, TOKENS[:, 1:]], 1)
    with silenced(model, hybrid, *every_sublayer(hybrid)):
        apart = difference(
            model(other, use_cache=False).logits[:, 1:], uncached(model)[:, 1:]
        )
    assert apart < 1e-6


@torch.no_grad()
def test_token_by_token_is_all_at_once(hybrid: Family) -> None:
    if hybrid.name in KEEP_NOTHING:
        pytest.skip("has no cache")
    if hybrid.name in DECODES_WRONG:
        pytest.skip("this transformers decodes it wrong")
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
    cache = (
        DynamicCache(config=model.config)
        if model.config.model_type in ANSWER_NO_CACHE
        else None
    )
    logits = []
    for position, token in enumerate(TOKENS.split(1, dim=1)):
        where = {"position_ids": torch.full_like(token, position)} if told else {}
        output = model(token, use_cache=True, cache=cache, **where)
        cache = output.get("cache", cache)
        logits.append(output.logits)
    return torch.cat(logits, 1)
