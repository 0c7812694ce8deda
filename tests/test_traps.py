"""The known ways of leaving out a sublayer wrongly: each is planted here, and seen to
be caught.

A fault is caught by the recomposition check (`locate` refuses the model) or by the
comparison of `test_architectures` with the slow twin; where both should catch it, both
are asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from api import (
    Argument,
    Branch,
    Op,
    branches,
    cutting,
    locating,
    proving,
    reading,
    regrouped,
    relative_error,
    slicing,
)
from families import TRANSFORMERS, TRANSFORMERS_5, family, silenced, stack_of
from notall import Plan, UnsupportedModel, locate, skip
from test_architectures import (
    EXACT,
    PLANS,
    PROMPT,
    check_family,
    generate,
    mask_for,
    prompt,
    uncached,
)

Patch = pytest.MonkeyPatch
ATTENTIONS = {
    name: plan
    for name, plan in PLANS.items()
    if name in ("first attention", "all but one attention")
}
MIXED = {"mixed": PLANS["mixed"]}
# Other numbers, a cache that has no such layer, and a mask of another window.
CATCHES = (
    "off by",
    "differs from its recomposition",
    "list index out of range",
    "must match the size of tensor",
)


def is_caught_by_comparison(
    name: str,
    plans: dict[str, Plan] = ATTENTIONS,
    before: Callable[[], Any] = lambda: None,
) -> bool:
    """Whether the comparison finds other numbers in a model that was located before
    `before` planted the fault.

    Anything else that goes wrong is no catch: it is raised.
    """
    model = family(name).build("eager")
    locate(model)
    before()
    try:
        check_family(family(name), model, plans)
    except (AssertionError, IndexError, RuntimeError) as error:
        return is_catch(error)
    return False


def is_caught_by_recomposition(name: str) -> bool:
    """Whether `locate` refuses a model since a layer is not what it is taken for; any
    other refusal is raised.
    """
    try:
        locate(family(name).build("eager"))
    except UnsupportedModel as refusal:
        return is_catch(refusal)
    return False


def is_catch(error: Exception) -> bool:
    if any(words in str(error) for words in CATCHES):
        return True
    raise error


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "olmo3",
        "gpt_oss",
        "granite",
        "bloom",
        "gpt_neox",
        "cohere",
        "gemma2",
        "gpt2",
    ],
)
def test_nothing_is_caught_where_nothing_is_planted(name: str) -> None:
    assert not is_caught_by_comparison(name)
    assert not is_caught_by_recomposition(name)


def test_an_error_of_another_kind_is_no_catch(monkeypatch: Patch) -> None:
    def mistaken(*_: Any) -> None:
        raise RuntimeError("a mistake of the test")

    with pytest.raises(RuntimeError, match="a mistake of the test"):
        is_caught_by_comparison(
            "llama", before=lambda: monkeypatch.setattr(cutting, "renumber", mistaken)
        )
    monkeypatch.setattr(proving, "renumber", mistaken)
    with pytest.raises(UnsupportedModel, match="a mistake of the test"):
        is_caught_by_recomposition("llama")


@pytest.mark.parametrize("name", ["llama", "gpt_neo"])
def test_stale_layer_index(name: str, monkeypatch: Patch) -> None:
    assert is_caught_by_comparison(
        name, before=lambda: monkeypatch.setattr(cutting, "renumber", lambda *_: [])
    )


def test_stale_layer_index_in_the_proof(monkeypatch: Patch) -> None:
    monkeypatch.setattr(proving, "renumber", lambda *_: [])
    assert is_caught_by_recomposition("llama")


@pytest.mark.parametrize("name", ["llama", "olmo2", "gemma3"])
def test_norm_left_running(name: str, monkeypatch: Patch) -> None:
    """As if the norm of what is skipped were still applied to the stream."""
    right = regrouped.Holder.forward

    def wrong(self: nn.Module, hidden: Tensor, *rest: Any) -> Tensor:
        norm = next(
            module
            for path, module in self.named_modules()
            if path.endswith("layernorm")
        )
        return right(self, norm(hidden), *rest)

    assert is_caught_by_comparison(
        name, before=lambda: monkeypatch.setattr(regrouped.Holder, "forward", wrong)
    )


@pytest.mark.parametrize("name", ["granite", "granitemoe"])
def test_residual_multiplier_forgotten(name: str, monkeypatch: Patch) -> None:
    def forget() -> None:
        right = Op.run
        monkeypatch.setattr(
            Op,
            "run",
            lambda self, *given: right(self, *given) if self.module else given[1],
        )

    assert is_caught_by_comparison(name, before=forget)
    assert is_caught_by_recomposition(name)


@pytest.mark.parametrize("name", ["olmo3", "gemma3", "gpt_oss", "cohere2", "ministral"])
def test_layer_list_not_sliced(name: str, monkeypatch: Patch) -> None:
    """Windows and the two kinds of RoPE: masks and caches are chosen by
    `config.layer_types`.
    """
    assert is_caught_by_comparison(
        name, before=lambda: monkeypatch.setattr(slicing, "PER_LAYER_LISTS", ())
    )


@pytest.mark.parametrize("name", ["olmo3", "gemma3", "gpt_oss"])
def test_layer_list_cut_from_the_front(name: str, monkeypatch: Patch) -> None:
    right = cutting.slice_config

    def wrong(config: Any, layers: Any) -> None:
        right(config, range(len(layers)))

    assert is_caught_by_comparison(
        name, before=lambda: monkeypatch.setattr(cutting, "slice_config", wrong)
    )


class NoAttention(nn.Module):
    """The naive way: the layer stays, with its number, and its attention answers
    zeros.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return torch.zeros_like(hidden_states), None


# transformers 4.57 happens to get the others right.
@pytest.mark.parametrize(
    "name",
    ["llama", "qwen3", "gpt2", *(["opt", "bloom", "gemma3"] if TRANSFORMERS_5 else [])],
)
@torch.no_grad()
def test_cache_length_of_layer_0(name: str) -> None:
    """With original numbering, layer 0's empty cache says that nothing was seen:
    positions and masks are wrong.
    """
    model, attention = family(name).build("eager"), family(name).attention
    if name == "gemma3":
        attention = "self_attn"
    tokens, mask = prompt(padded=True)

    plan = Plan([0])
    with skip(model, plan):
        found, scores = generate(model, tokens, mask)
    with silenced(model, family(name), plan.attention, ()):
        slow = uncached(model, found, mask_for(found, mask))
    assert relative_error(scores, slow[:, PROMPT - 1 : -1]) < EXACT

    naive = SelfAdding() if attention in family(name).adds_itself else NoAttention()
    layer = stack_of(model)[0]
    kept = layer._modules[attention]
    layer._modules[attention] = naive
    sequences, scores = generate(model, tokens, mask)
    layer._modules[attention] = kept
    with silenced(model, family(name), plan.attention, ()):
        slow = uncached(model, sequences, mask_for(sequences, mask))
    assert relative_error(scores, slow[:, PROMPT - 1 : -1]) > 1e-3, (
        "transformers mended this: say so in the docs"
    )


class SelfAdding(nn.Module):
    def forward(
        self, hidden_states: Tensor, residual: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        return residual, None


def test_attention_scaled_by_its_layer_index(monkeypatch: Patch) -> None:
    """transformers 4.57 divides by the very index that addresses the cache; 5 keeps the
    scale apart.
    """
    name = "gpt2 (scaled by layer)"
    if TRANSFORMERS_5:
        assert not is_caught_by_recomposition(name)
        return
    assert is_caught_by_recomposition(name)
    monkeypatch.setattr(locating, "prove", lambda *_: None)
    assert is_caught_by_comparison(name)


def lose(monkeypatch: Patch, *arguments: str) -> Callable[[], None]:
    """Plants the loss of arguments of the layer on their way to a mixer."""
    right = branches._fill

    def wrong(slot: Any, *rest: Any) -> Any:
        given = right(slot, *rest)
        lost = isinstance(slot, Argument) and slot.name in arguments
        return torch.zeros_like(given) if lost and isinstance(given, Tensor) else given

    return lambda: monkeypatch.setattr(branches, "_fill", wrong)


@pytest.mark.parametrize(
    ("name", "argument"),
    [("bloom", "alibi"), ("mpt", "position_bias"), ("falcon (ALiBi)", "alibi")],
)
def test_alibi_lost(name: str, argument: str, monkeypatch: Patch) -> None:
    if name == "falcon (ALiBi)" and TRANSFORMERS >= (5, 25):
        pytest.skip("its biases come with the mask, then")
    plant = lose(monkeypatch, argument)
    assert is_caught_by_comparison(name, {"MLPs": PLANS["MLPs"], **MIXED}, plant)
    assert is_caught_by_recomposition(name)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neo", "biogpt"])
def test_learned_positions_counted_by_layer_0(name: str, monkeypatch: Patch) -> None:
    """Positions come from the cache's length: not from the layer whose attention is
    skipped.
    """
    assert not is_caught_by_comparison(name, {"first attention": Plan([0])})
    assert is_caught_by_comparison(
        name,
        {"first attention": Plan([0])},
        lambda: monkeypatch.setattr(cutting, "renumber", lambda *_: []),
    )


@torch.no_grad()
def test_attention_sinks_stay_with_their_attention() -> None:
    model, plan = family("gpt_oss").build("eager"), Plan([0, 1, 3])
    tokens, _ = prompt(padded=False)
    with skip(model, plan):
        found = model(tokens).logits
        assert len(stack_of_live(model)) == 1
        stack_of_live(model)[0].self_attn.sinks.data.fill_(-1e9)
        assert relative_error(model(tokens).logits, found) > 1e-3
    assert stack_of(model)[2].self_attn.sinks.max() == -1e9, (
        "it is the sink of attention 2"
    )


def stack_of_live(model: nn.Module) -> nn.ModuleList:
    return model.get_submodule(locate(model).layers)


def test_soft_cap_lost(monkeypatch: Patch) -> None:
    right = cutting.slice_config

    def wrong(config: Any, layers: Any) -> None:
        right(config, layers)
        config.__dict__["final_logit_softcapping"] = None

    assert is_caught_by_comparison(
        "gemma2", before=lambda: monkeypatch.setattr(cutting, "slice_config", wrong)
    )


@pytest.mark.parametrize(
    "name",
    [
        "gpt_neox",
        "phi",
        "cohere",
        "falcon (parallel)",
        "falcon (two norms)",
        "stablelm (parallel)",
    ],
)
def test_parallel_block_taken_for_a_sequence(name: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(
        proving,
        "block_lines",
        lambda block: [part.branches for part in block.sublayers],
    )
    assert is_caught_by_recomposition(name)


@pytest.mark.parametrize("name", ["llama", "gpt_neox (sequential)"])
def test_sequence_taken_for_a_parallel_block(name: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(
        proving,
        "block_lines",
        lambda block: [block.sublayers[0].branches + block.sublayers[1].branches],
    )
    assert is_caught_by_recomposition(name)


@pytest.mark.parametrize("name", ["olmo2", "olmo3", "gemma2", "exaone4", "glm4"])
def test_norm_behind_the_mixer_forgotten(name: str, monkeypatch: Patch) -> None:
    right = reading.residual_lines

    def wrong(trace: Any) -> Any:
        return [
            tuple(replace(branch, ops=branch.ops[:-1]) for branch in line)
            for line in right(trace)
        ]

    monkeypatch.setattr(reading, "residual_lines", wrong)
    assert is_caught_by_recomposition(name)


@pytest.mark.parametrize(
    "name", ["cohere", "phi", "falcon (parallel)", "falcon (one norm)"]
)
def test_shared_norm_lost_with_the_attention(name: str, monkeypatch: Patch) -> None:
    """One norm feeds both mixers: the MLP still needs it when the attention goes."""
    right = Branch.run

    def wrong(self: Branch, holder: nn.Module, *rest: Any) -> Tensor:
        without = (
            replace(self, ops=self.ops[1:])
            if isinstance(holder, regrouped.Holder)
            else self
        )
        return right(without, holder, *rest)

    assert is_caught_by_comparison(
        name, before=lambda: monkeypatch.setattr(Branch, "run", wrong)
    )


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_residual_added_twice(name: str, monkeypatch: Patch) -> None:
    """These modules are handed the residual and add it themselves."""
    right = reading.residual_lines

    def wrong(trace: Any) -> Any:
        return [
            tuple(replace(branch, adds_itself=False) for branch in line)
            for line in right(trace)
        ]

    monkeypatch.setattr(reading, "residual_lines", wrong)
    assert is_caught_by_recomposition(name)
