"""Models whose layers hold other mixers than attention: each is skipped exactly, or
refused with its own reason.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from api import proving, relative_error
from families import TRANSFORMERS_5, Family, family, silenced
from hybrid_families import HYBRIDS, marks
from notall import Plan, UnsupportedModel, UsageError, locate, skip
from plain_families import NORMED_AFTER, OTHERS
from test_architectures import (
    EXACT,
    cached,
    described,
    generate,
    mask_for,
    prompt,
    static_cache_works,
    uncached,
)
from verdicts import RECORDING, compare_or_record

ON_5 = pytest.mark.skipif(
    not TRANSFORMERS_5, reason="transformers 4.57 keeps the states of hybrids elsewhere"
)

REFUSED = {
    "recurrent_gemma": (
        "keeps a state elsewhere"
    ),  # its recurrent blocks keep it on the module
    "minimax": "uses cache of its own",
    "longcat_flash": "no list of 8 decoder layers",
    "inkling2_text": "computes from other layers' answers",
    "inkling2_loop_text": "one after the other",
    "ergo": "changes the residual stream",
    "openai-gpt": "changes its hidden states",
}
REFUSED_IN_4 = [
    *(
        "bart",
        "bert",
        "doge",
        "gemma3n_text",
        "gpt_neox_japanese",
    ),  # there a cache keeps a place for every layer
    *(
        "bamba",
        "falcon_h1",
        "falcon_mamba",
        "jamba",
        "lfm2",
        "mamba",
        "mamba2",
        "qwen3_next",
        "recurrent_gemma",
    ),
]
EVERY = [*HYBRIDS, *OTHERS, *NORMED_AFTER]
PROVED = [family for family in EVERY if family.name not in REFUSED]
# of the others, whose layers are like those of families tried elsewhere, fewer plans
MANY = HYBRIDS
STATES = ("linear_attention", "conv")


def plans_of(family: Family, kinds: list[str]) -> Iterator[tuple[str, Plan]]:
    """By the kinds of the layers in the config, and what `family` says by hand of
    layers with one sublayer.
    """
    mixers = [i for i in range(family.depth) if i not in family.only_mlp]
    mlps = [i for i in range(family.depth) if i not in family.only_attention]
    states = [i for i in mixers if kinds[i] in STATES]
    caches = [i for i in mixers if i not in states] or states
    yield "first mixer", Plan(mixers[:1]) if caches != mixers[:1] else Plan(mixers[1:2])
    yield "mixed", Plan([mixers[1]], [*mlps[:1], *mlps[2:]])
    if family not in MANY:
        return
    yield "last mixer", Plan(mixers[-1:])
    yield "all but one that counts", Plan(caches[1:])
    if states and states != mixers:
        yield "one period's states", Plan(states[:1])
        yield "all states", Plan(states)
        yield "all states, all but one that counts", Plan([*states, *caches[:-1]])
    if not states:
        yield "middle mixer", Plan(mixers[2:3])
        yield "first and middle mixer", Plan(mixers[:3:2])
    if mlps:
        yield "MLPs", Plan([], [mlps[0], mlps[-1]])
        yield (
            "whole layers",
            Plan([i for i in (0, 2) if i in mixers], [i for i in (0, 2) if i in mlps]),
        )


def kinds_of(model: PreTrainedModel) -> list[str]:
    config = model.config.get_text_config()
    return list(
        getattr(config, "layer_types", None)
        or ["full_attention"] * config.num_hidden_layers
    )


@ON_5
@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=marks(one), id=str(one)) for one in PROVED]
)
@torch.no_grad()
def test_every_mixer_is_found_and_skipped_exactly(family: Family) -> None:
    if not family.exists:
        pytest.skip(f"this transformers has no {family.model_type}")
    model = family.build()
    before, modules = (
        copy.deepcopy(model.config.to_dict()),
        [id(module) for module in model.modules()],
    )
    config_class, dense = type(model.config), uncached(model, *prompt(False))
    dense_bytes = cache_bytes(
        cached(model, generate(model, *prompt(False))[0], None)[1]
    )
    static, looks_back = static_cache_works(model), beams_work(model)
    for _, plan in plans_of(family, kinds_of(model)):
        for padded in (False, True) if family in MANY or RECORDING else (False,):
            check(
                family,
                model,
                plan,
                padded,
                static=static,
                beams=looks_back and not padded,
                dense_bytes=dense_bytes,
            )
    assert torch.equal(uncached(model, *prompt(False)), dense)
    assert model.config.to_dict() == before
    assert type(model.config) is config_class
    assert [id(module) for module in model.modules()] == modules
    layers = described(model)
    halves = [
        sorted({layer[place] for layer in layers if len(layer) > place})
        for place in range(2)
    ]
    compare_or_record(
        family.name,
        verdict="exact",
        attention="eager",
        static_cache=static,
        block="parallel" if locate(model).blocks[-1].parallel else "sequential",
        alike=all(layer == layers[0] for layer in layers),
        sublayers=(
            [" / ".join(half) for half in halves]
            if family.only_mlp == ()
            else [" / ".join(halves[0]), "-"]
        ),
    )


def check(
    family: Family,
    model: PreTrainedModel,
    plan: Plan,
    padded: bool,
    *,
    static: bool,
    beams: bool,
    dense_bytes: list[int],
) -> None:
    """Like is compared with like: some models say other things with a cache than
    without, dense too.
    """
    tokens, mask = prompt(padded)
    with skip(model, plan):
        sequences, scores = generate(model, tokens, mask)
        whole = mask_for(sequences, mask)
        found = {"uncached": uncached(model, sequences, whole), "generate": scores}
        found["cached"], cache = cached(model, sequences, whole)
        if static:
            found["static cache"] = generate(
                model, tokens, mask, cache_implementation="static"
            )[1]
        if beams:
            found["beams"] = model.generate(tokens, **BEAMS).sequences_scores
    with silenced(model, family, plan.attention, plan.mlp):
        expected = {
            "uncached": uncached(model, sequences, whole),
            "generate": generate(model, tokens, mask)[1],
        }
        expected["cached"] = cached(model, sequences, whole)[0]
        expected["static cache"] = expected["generate"]
        if static and padded:
            expected["static cache"] = generate(
                model, tokens, mask, cache_implementation="static"
            )[1]
        if beams:
            expected["beams"] = model.generate(tokens, **BEAMS).sequences_scores
    real = (torch.ones_like(sequences) if whole is None else whole) == 1
    for how, answer in found.items():
        pair = (
            (answer, expected[how])
            if how not in ("uncached", "cached")
            else (answer[real], expected[how][real])
        )
        assert relative_error(*pair) < EXACT, (
            f"{family}, {plan}, padded {padded}, {how}: {relative_error(*pair):.1e}"
        )
    live = [
        i
        for i in range(family.depth)
        if i not in plan.attention and not (i in family.only_mlp and i in plan.mlp)
    ]
    live = sorted(
        {
            *live,
            *(
                lender
                for lender, readers in family.lends
                if {*readers}.intersection(live)
            ),
        }
    )
    held = [
        size for size in cache_bytes(cache) if size
    ]  # a layer without a mixer has a place that holds nothing
    assert held == [dense_bytes[i] for i in live if dense_bytes[i]], f"{family}, {plan}"


BEAMS: dict[str, Any] = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False, "output_scores": True,
                         "return_dict_in_generate": True}  # fmt: skip


def beams_work(model: PreTrainedModel) -> bool:
    try:
        model.generate(prompt(False)[0], **BEAMS)
    except (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError):
        return False
    return True


def cache_bytes(cache: Any) -> list[int]:
    """All that each layer of a cache holds, keys and values and states; positions lie
    with the first of Qwen 4's, and states have a number of tokens beside them.
    """
    held = [
        {
            name: value
            for name, value in vars(layer).items()
            if "position" not in name and "length" not in name
        }
        for layer in cache.layers
    ]
    return [
        sum(tensor.numel() * tensor.element_size() for tensor in tensors(layer))
        for layer in held
    ]


def tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict | list | tuple):
        for value in held.values() if isinstance(held, dict) else held:
            yield from tensors(value)


@ON_5
@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused_with_their_own_reason(name: str) -> None:
    found = family(name)
    if not found.exists:
        pytest.skip(f"this transformers has no {found.model_type}")
    with pytest.raises(UnsupportedModel, match=REFUSED[name]) as refusal:
        locate(found.build())
    said = str(refusal.value)
    assert "\n" not in said
    compare_or_record(name, verdict="refused", reason=said)


@pytest.mark.skipif(TRANSFORMERS_5, reason="these are located there")
@pytest.mark.parametrize("name", REFUSED_IN_4)
def test_on_transformers_4_all_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        locate(family(name).build())
    compare_or_record(name, verdict="refused", reason=str(refusal.value))


# --- what a cache holds, and what must stay
# --------------------------------------------------------------------------------------


@ON_5
@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "qwen3_next",
        "lfm2",
        "falcon_h1",
        "nemotron_h",
        "mamba2",
        "deepseek_v32",
        "zamba2",
        "doge",
    ],
)
def test_bytes_of_keys_values_and_states_are_those_of_the_cache(name: str) -> None:
    model = family(name).build()
    tokens = prompt(False)[0]
    held = cache_bytes(model(tokens, use_cache=True)["cache"])
    batch, length = tokens.shape
    for part in locate(model).sublayers:
        if part.kind == "attention":
            assert held[part.index] == batch * (
                part.state_bytes + length * part.kv_bytes_per_token
            ), part.name


@ON_5
@pytest.mark.parametrize("name", ["qwen3_next", "lfm2", "nemotron_h"])
def test_an_attention_that_counts_tokens_stays(name: str) -> None:
    model = family(name).build()
    counting = [i for i, kind in enumerate(kinds_of(model)) if kind == "full_attention"]
    with pytest.raises(
        UsageError,
        match=f"every attention that holds keys and values .*attn.{counting[0]}",
    ):
        Plan(counting).check(locate(model))


@ON_5
@torch.no_grad()
def test_caches_count_as_before_after_a_skip_of_the_first_mixers() -> None:
    """transformers 5.25 asks the first place of a cache how many tokens it holds."""
    model, before = family("nemotron_h").build(), Cache.get_seq_length
    with skip(model, Plan([0, 1])):  # what is left begins with an MLP
        assert Cache.get_seq_length is not before
        cache = model(prompt(False)[0], use_cache=True)["cache"]
        assert cache.get_seq_length() == prompt(False)[0].shape[1]
    assert Cache.get_seq_length is before


@ON_5
def test_what_a_layer_lacks_cannot_be_skipped() -> None:
    structure = locate(family("nemotron_h").build())
    with pytest.raises(UsageError, match="the attention of layer 2, which has none"):
        Plan([2]).check(structure)
    with pytest.raises(UsageError, match="the mlp of layer 0, which has none"):
        Plan([], [0]).check(structure)


# --- planted faults
# --------------------------------------------------------------------------------------


@ON_5
def test_an_mlp_that_looks_at_other_tokens_is_caught() -> None:
    model = family("qwen3_next").build()
    model.model.layers[2].mlp.register_forward_hook(
        lambda mlp, args, answer: answer + 0.01 * answer.cumsum(1)
    )
    with pytest.raises(UnsupportedModel, match=r"layer 2 .* mlp looks at other tokens"):
        locate(model)


@ON_5
def test_an_mlp_that_counts_its_calls_is_caught() -> None:
    model = family("lfm2").build()
    calls: list[int] = []

    def count(mlp: object, args: object, answer: Tensor) -> Tensor:
        calls.append(1)
        return answer * (1 + 0.01 * len(calls))

    model.model.layers[1].feed_forward.register_forward_hook(count)
    with pytest.raises(UnsupportedModel, match="layer 1 "):
        locate(model)


@ON_5
def test_without_the_look_at_other_tokens_it_would_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proving, "_prove_local", lambda *_: None)
    model = family("qwen3_next").build()
    model.model.layers[2].mlp.register_forward_hook(
        lambda mlp, args, answer: answer + 0.01 * answer.cumsum(1)
    )
    locate(model)
