"""Skipping is exact, for every family: it equals the model in which plain hooks make
the same sublayers add nothing.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from api import cache_argument, relative_error
from families import (
    FAMILIES,
    REFUSED_IN_4,
    TRANSFORMERS_5,
    Family,
    each_block,
    representatives,
    silenced,
    stack_of,
)
from notall import Plan, Sublayer, UnsupportedModel, locate, skip
from verdicts import RECORDING, compare_or_record

pytestmark = pytest.mark.each_release

PROMPT, NEW = (
    8,
    4,
)  # past two windows, and past chunks of one window both in the prompt and behind it
PLANS = {
    "first attention": Plan([0]),
    "middle attention": Plan([2]),
    "last attention": Plan([3]),
    "several attentions": Plan([0, 2]),
    "all but one attention": Plan([0, 1, 3]),
    "MLPs": Plan([], [0, 3]),
    "block": Plan([1], [1]),
    "mixed": Plan([0, 1], [2, 3]),
}
# Where padding, or a fused attention, may matter: a first layer without a cache, one
# layer alone, a mixture.
FEW = (
    PLANS
    if RECORDING
    else {n: PLANS[n] for n in ("first attention", "all but one attention", "mixed")}
)
# Of a family that is built like one that is tried with every plan.
FEWEST = {n: PLANS[n] for n in ("several attentions", "mixed")}
EXACT = 1e-5


@each_block(FAMILIES)
def test_every_sublayer_is_found_and_skipped_exactly(family: Family) -> None:
    if not family.exists:
        pytest.skip(f"this transformers has no {family.model_type}")
    if family.name in REFUSED_IN_4 and not TRANSFORMERS_5:
        with pytest.raises(UnsupportedModel, match="recomposition") as refusal:
            locate(family.build())
        compare_or_record(family.name, verdict="refused", reason=str(refusal.value))
        return
    # Of prompts that are not padded, and of padded ones; the other two are in a test of
    # their own.
    plans = {
        "eager": (PLANS, FEW if RECORDING else {}),
        "sdpa": (FEW if RECORDING else {}, FEW),
    }
    if family not in representatives():
        plans = dict.fromkeys(plans, (FEWEST, FEWEST))
    proved = [
        a
        for a in plans
        if (model := build(family, a)) and check_family(family, model, *plans[a])
    ]
    model = family.build()
    layers = described(model)
    compare_or_record(
        family.name,
        verdict="exact",
        attention=", ".join(proved),
        static_cache=static_cache_works(model),
        block="parallel" if locate(model).blocks[-1].parallel else "sequential",
        alike=layers[0] == layers[-1],
        sublayers=layers[-1],
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", representatives(), ids=str)
def test_padding_and_kinds_of_attention_are_tried_with_each_other(
    family: Family,
) -> None:
    if family.name in REFUSED_IN_4 and not TRANSFORMERS_5:
        pytest.skip("it is refused there")
    for attention, plans in {"eager": ({}, FEW), "sdpa": (FEW, {})}.items():
        if model := build(family, attention):
            assert check_family(family, model, *plans)


# of transformers alone: what changes nothing in families.py leaves it as it is
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=str)
@torch.no_grad()
def test_every_sublayer_matters(family: Family) -> None:
    """Else a skip that does nothing would pass for exact."""
    if not family.exists:
        pytest.skip(f"this transformers has no {family.model_type}")
    model, (tokens, _) = family.build(), prompt(False)
    dense = uncached(model, tokens, None)
    for index in range(4):
        for attention, mlp in (((index,), ()), ((), (index,))):
            with silenced(model, family, attention, mlp):
                assert relative_error(uncached(model, tokens, None), dense) > 1e-3


# it builds every family, and holds of what is kept in docs/architectures.jsonl
@pytest.mark.slow
def test_every_structure_has_a_representative() -> None:
    """Layer by layer, from the models themselves; the representatives are chosen by
    what is kept of them.
    """

    def structures(families: list[Family]) -> set[str]:
        found = set()
        for family in families:
            model = family.build()
            with contextlib.suppress(UnsupportedModel):
                kinds = getattr(model.config.get_text_config(), "layer_types", None)
                found.add(f"{described(model)} {kinds}")
        return found

    everyone = structures([family for family in FAMILIES if family.exists])
    assert len(everyone) > 30
    assert structures(representatives()) == everyone


def described(model: PreTrainedModel) -> list[list[str]]:
    """The sublayers of every layer."""
    layers = stack_of(model)
    return [
        [describe(sublayer, layers[b.index]) for sublayer in b.sublayers]
        for b in locate(model).blocks
    ]


def describe(sublayer: Sublayer, layer: nn.Module) -> str:
    """Such as `input_layernorm > self_attn`, in the order in which they run."""
    branches = [
        " > ".join(op.module or op.name for op in b.ops) for b in sublayer.branches
    ]
    if sublayer.stub:
        branches = [" > ".join(sublayer.modules) or "the whole layer"]
    parts = (
        part
        for name in sublayer.modules
        for part in layer.get_submodule(name).modules()
    )
    experts = any(
        "expert" in type(part).__name__.lower() or "moe" in type(part).__name__.lower()
        for part in parts
    )
    return " + ".join(branches) + (
        " (experts)" if experts and sublayer.kind == "mlp" else ""
    )


def build(family: Family, attention: str) -> PreTrainedModel | None:
    try:
        return family.build(attention)
    except ValueError as error:
        if "does not support an attention implementation" not in str(error):
            raise
        return None


@torch.no_grad()
def check_family(
    family: Family,
    model: PreTrainedModel,
    plain: dict[str, Plan],
    padded: dict[str, Plan] | None = None,
) -> bool:
    """True, or an `AssertionError` that says what differs; `padded` are plans of padded
    prompts, if not the same.
    """
    structure = locate(model)
    assert len(structure.blocks) == 4
    config = copy.deepcopy(model.config.to_dict())
    modules = [id(module) for module in model.modules()]
    texts = {"plain": prompt(False), "padded": prompt(True)}
    dense = {way: uncached(model, *texts[way]) for way in texts}
    dense_bytes = cache_bytes(
        cached(model, generate(model, *texts["plain"])[0], None)[1]
    )
    static = {
        "plain": static_cache_works(model),
        "padded": RECORDING and static_cache_works(model),
    }
    for way, plans in (
        ("plain", plain),
        ("padded", plain if padded is None else padded),
    ):
        tokens, mask = texts[way]
        for name, plan in plans.items():
            where = f"{family}, {name}, {way}"
            with skip(model, plan):
                sequences, scores = generate(model, tokens, mask)
                whole = mask_for(sequences, mask)
                parallel = uncached(model, sequences, whole)
                stepwise, cache = cached(model, sequences, whole)
                if static[way]:
                    again, static_scores = generate(
                        model, tokens, mask, cache_implementation="static"
                    )
            with silenced(model, family, plan.attention, plan.mlp):
                slow = uncached(model, sequences, whole)
            real = (torch.ones_like(sequences) if whole is None else whole) == 1
            new = slow[:, PROMPT - 1 : -1]
            answers = {
                "uncached": (parallel[real], slow[real]),
                "cached": (stepwise[real], slow[real]),
                "generate": (scores, new),
            }
            if static[way]:
                assert torch.equal(again, sequences), f"{where}: static cache"
                answers["static cache"] = (static_scores, new)
            for how, pair in answers.items():
                assert relative_error(*pair) < EXACT, (
                    f"{where}, {how}: off by {relative_error(*pair):.1e}"
                )
            live = [
                size
                for index, size in enumerate(dense_bytes)
                if index not in plan.attention
            ]
            assert cache_bytes(cache) == live, where
    for way in texts:
        assert same(uncached(model, *texts[way]), dense[way]), "undo"
        with skip(model, Plan()):
            assert same(uncached(model, *texts[way]), dense[way]), "empty plan"
    assert model.config.to_dict() == config
    assert [id(module) for module in model.modules()] == modules
    return True


# --- the ways of running a model
# --------------------------------------------------------------------------------------


def prompt(padded: bool) -> tuple[Tensor, Tensor | None]:
    tokens = torch.randint(
        3, 99, (2, PROMPT), generator=torch.Generator().manual_seed(0)
    )
    if not padded:
        return tokens, None
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    return tokens.masked_fill(mask == 0, 0), mask


def mask_for(sequences: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask of a prompt, for the prompt and what was generated."""
    return (
        None
        if mask is None
        else torch.cat([mask, mask.new_ones(len(mask), sequences.shape[1] - PROMPT)], 1)
    )


def positions(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor | None
) -> dict[str, Tensor]:
    """As `generate` counts positions: real tokens only, for models that are told
    them.
    """
    if (
        mask is None
        or "position_ids" not in inspect.signature(type(model).forward).parameters
    ):
        return {}
    return {"position_ids": (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)}


def uncached(model: PreTrainedModel, tokens: Tensor, mask: Tensor | None) -> Tensor:
    return model(
        tokens, attention_mask=mask, use_cache=False, **positions(model, tokens, mask)
    ).logits


def cached(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor | None
) -> tuple[Tensor, DynamicCache]:
    """By hand: the prompt at once, then token by token."""
    where, cache, logits = positions(model, tokens, mask), None, []
    for start, end in [
        (0, PROMPT),
        *((t, t + 1) for t in range(PROMPT, tokens.shape[1])),
    ]:
        output = model(
            tokens[:, start:end],
            attention_mask=None
            if mask is None or (start and masks_its_tokens_alone(model))
            else mask[:, :end],
            use_cache=True,
            **{name: value[:, start:end].contiguous() for name, value in where.items()},
            **({cache_argument(model): cache} if cache is not None else {}),
            **(
                {"cache_position": torch.arange(start, end)}
                if counts_rope_deltas(model)
                else {}
            ),
        )
        cache = output[cache_argument(model)]
        cache = getattr(cache, "self_attention_cache", cache)
        logits.append(output.logits)
    return torch.cat(logits, 1), cache


def masks_its_tokens_alone(model: PreTrainedModel) -> bool:
    """Mamba takes a mask of the tokens of the step, of which `generate` gives it none
    after the prompt.
    """
    return model.config.model_type in ("mamba", "falcon_mamba")


def counts_rope_deltas(model: PreTrainedModel) -> bool:
    """Qwen-VL in transformers 4.57 tells a position from `cache_position` alone."""
    return not TRANSFORMERS_5 and hasattr(model.base_model, "rope_deltas")


def generate(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Greedily: the sequences, and the logits of each new token, (batch, new tokens,
    vocabulary).
    """
    answer = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens) if mask is None else mask,
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return answer.sequences, torch.stack(answer.logits, 1)


def static_cache_works(model: PreTrainedModel) -> bool:
    """Whether the original model runs with a static cache, and says the same as
    without.
    """
    try:
        _, scores = generate(model, *prompt(False), cache_implementation="static")
    except (ValueError, RuntimeError, TypeError, AttributeError, LookupError):
        return False
    return relative_error(scores, generate(model, *prompt(False))[1]) < EXACT


def cache_bytes(cache: Any) -> list[int]:
    return [
        sum(
            t.numel() * t.element_size()
            for t in (layer.keys, layer.values)
            if t is not None
        )
        for layer in cache.layers
    ]


def same(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.nan_to_num(), expected.nan_to_num())
