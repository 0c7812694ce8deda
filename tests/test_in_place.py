"""Layers that depend on each other stay in place: who lends what, what is freed, and
what is caught.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from api import (
    Footprint,
    Head,
    Replay,
    Space,
    by_footprint,
    footprint,
    proving,
    record,
    relative_error,
)
from families import TRANSFORMERS_5, family, replayed_logits, silenced, stack_of
from notall import (
    Plan,
    UnsupportedModel,
    UsageError,
    export,
    locate,
    remove,
    repair,
    skip,
)
from test_architectures import EXACT, cached, prompt, uncached
from test_weightless import empty, facts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.each_release,
    pytest.mark.skipif(
        not TRANSFORMERS_5, reason="transformers 4.57 keeps a place for every layer"
    ),
]

# One of each way to depend on others; the rest are like these.
KINDS = [
    *(
        "gemma4_text",
        "gemma3n_text",
        "glm_moe_dsa",
        "zaya",
        "zamba2",
        "deepseek_v4",
        "doge",
    ),
    *("qwen4_exp_text", "bert", "bart", "dbrx"),
]


def lends(name: str, **changes: Any) -> dict[str, tuple[str, ...]]:
    return {
        part.name: part.read_by
        for part in locate(family(name).build(**changes)).sublayers
        if part.read_by
    }


# --- who reads what
# --------------------------------------------------------------------------------------


def test_lenders_of_keys_and_values_are_found_with_those_who_read_them() -> None:
    assert lends("gemma4_text") == {"attn.0": ("attn.2",), "attn.1": ("attn.3",)}
    assert lends("gemma4_text", num_kv_shared_layers=1) == {"attn.1": ("attn.3",)}
    assert lends("gemma4_text", num_kv_shared_layers=0) == {}


def test_what_is_only_handed_on_is_no_loan() -> None:
    assert lends("glm_moe_dsa") == {"attn.0": ("attn.1",), "attn.2": ("attn.3",)}
    assert lends("glm_moe_dsa", indexer_types=["full", "shared", "shared", "full"]) == {
        "attn.0": ("attn.1", "attn.2")
    }
    assert lends("glm_moe_dsa", indexer_types=["full"] * 4) == {}


def test_mlps_lend_too() -> None:
    assert lends("zaya") == {f"mlp.{i}": (f"mlp.{i + 1}",) for i in range(3)}


@pytest.mark.parametrize("name", KINDS)
def test_same_structure_without_weights(name: str) -> None:
    assert facts(locate(empty(family(name)))) == facts(locate(family(name).build()))


# --- what is freed
# --------------------------------------------------------------------------------------


def kept_bytes(name: str, plan: Plan) -> tuple[int, Footprint]:
    """What the cache holds after two tokens of one sequence, by itself, and what a
    footprint says.
    """
    model = family(name).build()
    with skip(model, plan):
        cache = model(torch.tensor([[3, 4]]), use_cache=True)["cache"]
    held = [
        kept
        for layer in cache.layers
        for kept in (layer.keys, layer.values)
        if kept is not None
    ]
    return sum(kept.numel() * kept.element_size() for kept in held), footprint(
        model, plan
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "plan", [[], [0], [2], [0, 2], [0, 2, 3], [1, 3], [1]], ids=str
)
def test_a_lender_keeps_its_keys_and_values_until_nobody_reads_them(
    plan: list[int],
) -> None:
    held, said = kept_bytes("gemma4_text", Plan(plan))
    sizes = {
        0: 2 * 2 * 8 * 4,
        1: 2 * 2 * 16 * 4,
    }  # keys and values, heads, width, bytes of a number
    freed = [i for i, reader in ((0, 2), (1, 3)) if i in plan and reader in plan]
    expected = sum(size for i, size in sizes.items() if i not in freed)
    assert (held, said.kv_bytes_per_token) == (2 * expected, expected)


@torch.no_grad()
def test_weights_of_a_lender_stay_and_those_of_whom_nobody_reads_go() -> None:
    sizes = {name: kept_bytes("gemma4_text", plan)[1].params for name, plan in (
        ("dense", Plan()), ("lender", Plan([0])), ("reader", Plan([2])), ("both", Plan([0, 2])))}  # fmt: skip
    parts = {
        part.name: part.parameters
        for part in locate(family("gemma4_text").build()).sublayers
    }
    assert sizes["lender"] == sizes["dense"]
    assert sizes["reader"] == sizes["dense"] - parts["attn.2"]
    assert sizes["both"] == sizes["reader"] - parts["attn.0"]


def test_weights_that_another_layer_shares_stay() -> None:
    model = family("zamba2").build()
    shared = sum(p.numel() for p in stack_of(model)[1].shared_transformer.parameters())
    own = sum(p.numel() for p in stack_of(model)[1].parameters()) - shared
    assert footprint(model, Plan()).params - footprint(model, Plan([1])).params == own


@torch.no_grad()
def test_what_is_skipped_is_not_run() -> None:
    model = family("gemma4_text").build()
    locate(model)
    ran: list[str] = []
    for index, layer in enumerate(stack_of(model)):
        for name in ("self_attn", "mlp"):
            layer.get_submodule(name).register_forward_pre_hook(
                lambda *_, who=f"{name} {index}": ran.append(who)
            )
    with skip(model, Plan([0, 3], [1])):
        uncached(model, *prompt(False))
    assert ran == [
        "self_attn 0",
        "mlp 0",
        "self_attn 1",
        "self_attn 2",
        "mlp 2",
        "mlp 3",
    ]  # 0 is read by 2


@torch.no_grad()
def test_a_cache_that_keeps_a_place_for_what_is_skipped_is_refused() -> None:
    model = family("gemma4_text").build()
    tokens = prompt(False)[0]
    with skip(model, Plan([1, 3])):
        with pytest.raises(
            UsageError,
            match=r"keeps a place for layer 1, .* DynamicCache\(config=model.config\)",
        ):
            model(tokens, use_cache=True, cache=DynamicCache())
        model(tokens, use_cache=True, cache=DynamicCache(config=model.config))


@torch.no_grad()
def test_a_skip_inside_a_skip_leaves_out_what_either_names() -> None:
    one, tokens = family("gemma4_text"), prompt(False)
    model = one.build()
    with skip(model, Plan([2])), skip(model, Plan([0], [1])):
        both = uncached(model, *tokens)
    with silenced(model, one, (0, 2), (1,)):
        assert relative_error(both, uncached(model, *tokens)) < EXACT


# --- planted faults
# --------------------------------------------------------------------------------------


def test_a_layer_that_reads_anothers_place_in_the_cache_is_caught() -> None:
    model = family("gemma4_text").build()

    def peek(attention: nn.Module, args: Any, kwargs: Any, answer: Any) -> Any:
        return (answer[0] + kwargs["cache"].layers[0].keys.mean(), *answer[1:])

    stack_of(model)[2].self_attn.register_forward_hook(peek, with_kwargs=True)
    with pytest.raises(UnsupportedModel):
        locate(model)


def test_an_input_that_the_model_makes_of_other_layers_answers_is_caught() -> None:
    model = family("gemma4_text").build()
    layers, seen = stack_of(model), []
    layers[0].register_forward_hook(lambda layer, args, answer: seen.append(answer))

    def mix(layer: nn.Module, args: Any, kwargs: Any) -> Any:
        return (args[0], args[1] + seen[-1].mean(), *args[2:]), kwargs

    layers[2].register_forward_pre_hook(mix, with_kwargs=True)
    with pytest.raises(
        UnsupportedModel,
        match=r"layer 2 .* is given what the model computes from other",
    ):
        locate(model)


def test_an_mlp_that_looks_at_other_tokens_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = family("gemma4_text").build()
    stack_of(model)[2].mlp.register_forward_hook(
        lambda mlp, args, answer: answer + 0.01 * answer.cumsum(1)
    )
    with pytest.raises(
        UnsupportedModel, match=r"layer 2 .* looks at other tokens without a cache"
    ):
        locate(model)
    monkeypatch.setattr(proving, "_prove_local", lambda *_: None)
    locate(model)  # without that look it would pass


def test_a_layer_that_counts_on_what_is_left_out_is_caught() -> None:
    model = family("gemma4_text").build()
    layer, made = stack_of(model)[1], []
    layer.mlp.register_forward_hook(lambda mlp, args, answer: made.append(answer))
    layer.per_layer_input_gate.register_forward_hook(
        lambda gate, args, answer: answer + made.pop().mean()
    )
    with pytest.raises(UnsupportedModel):
        locate(model)


def test_a_whole_layer_that_keeps_a_state_elsewhere_is_caught() -> None:
    model = family("bert").build()
    layer, seen = stack_of(model)[1], []

    def remember(layer: nn.Module, args: Any, answer: Tensor) -> Tensor:
        seen.append(answer)
        return answer + 0.1 * len(seen)

    layer.register_forward_hook(
        lambda layer, args, answer: (*answer,) if isinstance(answer, tuple) else answer
    )
    layer.attention.output.register_forward_hook(remember)
    with pytest.raises(UnsupportedModel, match=r"layer 1 .* differs"):
        locate(model)


# --- what else is done with plans
# --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_plans_are_evaluated_as_they_are_skipped(name: str) -> None:
    one = family(name)
    model, (tokens, _) = one.build(), prompt(False)
    plans = [
        Plan(),
        Plan([1]),
        Plan([2, 3]),
        Plan([1], [0]) if not one.only_attention else Plan([0]),
    ]
    replay, head = Replay(model, plans), Head(model)
    found = {}
    for numbers, hidden in replay.hidden_states(record(model, input_ids=tokens)):
        found |= dict.fromkeys(numbers, head.logits(hidden.flatten(0, 1)))
    assert found.keys() == {0, 1, 2, 3}
    for number, plan in enumerate(plans):
        with silenced(model, one, plan.attention, plan.mlp):
            expected = uncached(model, tokens, None).flatten(0, 1)
        assert relative_error(found[number], expected) < EXACT, plan
    assert dict(replayed_logits(replay, input_ids=tokens)).keys() == found.keys()
    alone = sum(len(locate(model).running(plan)) for plan in plans)
    assert replay.executions == alone or locate(model).apart


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma4_text", "bert", "dbrx"])
def test_what_is_removed_is_what_is_skipped(name: str, tmp_path: Any) -> None:
    model, tokens = family(name).build(), prompt(False)
    plan = Plan([0, 2])
    weights = sum(p.numel() for p in model.parameters())
    with skip(model, plan):
        expected = uncached(model, *tokens), cached(model, tokens[0], None)[0]
    freed = weights - footprint(model, plan).params
    remove(model, plan)
    assert relative_error(uncached(model, *tokens), expected[0]) < EXACT
    assert relative_error(cached(model, tokens[0], None)[0], expected[1]) < EXACT
    assert sum(p.numel() for p in model.parameters()) == weights - freed > 0
    if name == "gemma4_text":
        with pytest.raises(UsageError, match="keep the original checkpoint"):
            model.save_pretrained(tmp_path)
        with pytest.raises(UnsupportedModel, match="removed from this model for good"):
            locate(model)
        return
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert relative_error(uncached(again.eval(), *tokens), expected[0]) < EXACT


@torch.no_grad()
@pytest.mark.parametrize("name", ["dbrx", "bert", "inkling_text", "qwen4_exp_text"])
def test_an_export_without_whole_layers_is_exact(name: str, tmp_path: Any) -> None:
    model, plan = family(name).build(), Plan([0, 2])
    model.save_pretrained(tmp_path / "dense")
    export(tmp_path / "dense", plan, target="hf", out=tmp_path / "out")
    again = (
        type(model)
        .from_pretrained(tmp_path / "out", attn_implementation="eager")
        .eval()
    )
    assert again.config.num_hidden_layers == 2
    with silenced(model, family(name), plan.attention, plan.mlp):
        assert (
            relative_error(
                uncached(again, *prompt(False)), uncached(model, *prompt(False))
            )
            < EXACT
        )


def test_layers_that_a_list_by_index_tells_are_not_saved_wrong(tmp_path: Any) -> None:
    model = family("qwen4_exp_text (n-grams)").build()
    remove(model, Plan([0]))
    with pytest.raises(UsageError, match="keep the original checkpoint"):
        model.save_pretrained(tmp_path)


def test_a_quantised_model_is_saved_where_its_widths_are_those_of_the_config(
    tmp_path: Any,
) -> None:
    class Quantised(nn.Linear):
        pass

    for narrow in (False, True):
        model = family("llama").build()
        model.is_quantized = True
        for module in model.model.modules():
            if type(module) is nn.Linear:
                module.__class__ = Quantised
        if narrow:
            model.model.layers[2].mlp.up_proj.out_features -= 8
        remove(model, Plan([1], [1]))
        assert ("save_pretrained" in model.__dict__) == narrow  # then saving is refused


def test_what_looks_inside_of_layers_says_that_it_cannot(tmp_path: Any) -> None:
    model = family("gemma4_text").build()
    tokens = [prompt(False)[0][:1], prompt(False)[0][1:]]
    with pytest.raises(UsageError, match="a repair runs sublayers one at a time"):
        repair(model, Plan([2]), tokens)
    with pytest.raises(
        UsageError,
        match="no set is portable: layers of gemma4_text depend on each other",
    ):
        Space(locate(model), portable=True)


def test_a_budget_counts_what_a_lender_saves_when_nobody_reads_it() -> None:
    model = family("gemma4_text").build()
    space = Space(locate(model), "attention")
    budget = by_footprint(model, space, "kv_bytes_per_token", 0.3)
    assert [
        budget.saved(skipped)
        for skipped in ({"attn.0"}, {"attn.2"}, {"attn.0", "attn.2"})
    ] == [0, 0, 128]
    assert budget.rate(("attn.2",), 1.0, frozenset({"attn.0"})) < budget.rate(
        ("attn.2",), 1.0, frozenset()
    )
    with pytest.raises(UsageError, match="ask for at most 256"):
        by_footprint(model, space, "kv_bytes_per_token", 0.7)


def test_an_export_is_refused_before_anything_is_written(tmp_path: Any) -> None:
    model = family("gemma4_text").build()
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(UsageError, match="layers of gemma4_text depend on each other"):
        export(tmp_path / "dense", Plan([0], [0]), target="hf", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
