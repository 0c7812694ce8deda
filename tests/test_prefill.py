"""Prefill-only skipping as it runs: one forward pass gives what a prompt and the rest
give, read in two calls.
"""

from collections import Counter

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from api import cache_argument
from families import (
    FAMILIES,
    REFUSED_IN_4,
    TRANSFORMERS_5,
    each_block,
    family as named,
    silenced,
)
from notall import Plan, UnsupportedModel, UsageError, locate, prompt, skip

pytestmark = pytest.mark.each_release

TOKENS, NEW = 14, 6
PADDING = 3
WITHOUT = {"axk2"}  # its attention keeps an index of its own in the cache
if not TRANSFORMERS_5:
    WITHOUT |= {"phimoe"}  # it looks its rotary tables up by position
LLAMA = named("llama")
FREE = 2e-6  # some roundings of float32, of the largest logit
ROUNDING = 1e-5  # of the largest logit


def ids_and_mask():
    ids = torch.randint(3, 90, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    return ids, mask


def deep(model, last_tokens=1, attention=True, mlp=True):
    """All but the first attention and MLP, skipped in the prompt."""
    structure = locate(model)
    mixers = [
        p.index
        for p in structure.sublayers
        if p.kind == "attention" and p.kv_bytes_per_token
    ]
    mlps = [p.index for p in structure.sublayers if p.kind == "mlp"]
    return Plan(
        prefill={
            "attention": mixers[1:] if attention else [],
            "mlp": mlps[1:] if mlp else [],
            "last_tokens": last_tokens,
        }
    )


def adding_nothing(model, plan, of=LLAMA):
    """The slow, obvious reference: what is skipped runs and writes keys and values, and
    adds nothing.
    """
    return silenced(model, of, plan.prefill.attention, plan.prefill.mlp)


def cached(model, output):
    """The cache of an output, as an argument."""
    return {cache_argument(model): output[cache_argument(model)]}


@torch.no_grad()
def in_two_calls(model, plan, ids, mask, of=LLAMA):
    """What the model answers to the last tokens of a prompt, behind the others."""
    early = ids.shape[1] - plan.prefill.last_tokens
    with adding_nothing(model, plan, of):
        read = model(ids[:, :early], attention_mask=mask[:, :early], use_cache=True)
    return model(
        ids[:, early:], attention_mask=mask, use_cache=True, **cached(model, read)
    )


def tensors(model, output):
    """The keys and values of an output, (batch, heads, tokens, width) each."""
    cache = output[cache_argument(model)]
    layers = getattr(cache, "self_attention_cache", cache).layers
    return [one for layer in layers for one in (layer.keys, layer.values)]


def close(found, expected):
    return float((found - expected).abs().max() / expected.abs().max()) < ROUNDING


KNOWN = [
    one
    for one in FAMILIES
    if one.exists and (TRANSFORMERS_5 or one.name not in REFUSED_IN_4)
]
each_family = each_block(KNOWN)


def begins_again(model):
    """Whether transformers 4 counts positions from 0 behind a cache, unless `generate`
    says them.
    """
    return not TRANSFORMERS_5 and hasattr(model.base_model, "rope_deltas")


@each_family
@torch.no_grad()
def test_one_pass_is_two_calls_and_leaving_restores_the_model(family):
    model = family.build()
    ids, mask = ids_and_mask()
    original = model(ids, attention_mask=mask).logits
    plan = deep(model, last_tokens=3)
    if family.name in WITHOUT:
        with (
            pytest.raises(
                UnsupportedModel, match="cannot be skipped in the prompt alone"
            ),
            skip(model, plan),
        ):
            pass
        return
    with skip(model, plan):
        assert torch.equal(model(ids, attention_mask=mask).logits, original), (
            "no prompt is declared"
        )
        with prompt(model, TOKENS):
            one = model(ids, attention_mask=mask, use_cache=True)
    changed = one.logits[:, -3:]
    assert not close(changed, original[:, -3:])
    assert torch.equal(model(ids, attention_mask=mask).logits, original)
    with skip(model, plan), prompt(model, TOKENS):
        assert torch.equal(model(ids, attention_mask=mask).logits[:, -3:], changed)
    if begins_again(model):
        return
    two = in_two_calls(model, plan, ids, mask, family)
    assert close(changed, two.logits)
    for found, expected in zip(tensors(model, one), tensors(model, two)):
        rows = mask[
            :, None, -found.shape[2] :, None
        ].bool()  # what stands at padding is read by nothing
        assert close(found.masked_fill(~rows, 0), expected.masked_fill(~rows, 0))


@each_family
@torch.no_grad()
def test_prompt_in_chunks_is_the_prompt_at_once(family):
    if family.name in WITHOUT:
        pytest.skip("its keys and values cannot be written alone")
    model = family.build()
    if begins_again(model):
        pytest.skip("its chunks are apart without a skip, too")
    ids, mask = ids_and_mask()
    with skip(model, deep(model, last_tokens=2)), prompt(model, TOKENS):
        whole = model(ids, attention_mask=mask).logits[:, -2:]
        cache = {}
        for start, end in [(0, 5), (5, 9), (9, TOKENS)]:
            found = model(
                ids[:, start:end], attention_mask=mask[:, :end], use_cache=True, **cache
            )
            cache = cached(model, found)
    assert close(found.logits[:, -2:], whole)


@each_family
@torch.no_grad()
def test_last_block_is_free(family):
    """Nothing reads what it makes of all but the last token; one row is a matrix
    product of another rounding.
    """
    model = family.build()
    ids, mask = ids_and_mask()
    structure = locate(model)
    last = structure.blocks[-1]
    skipped = {
        kind: [last.index]
        for kind in last.kinds
        if kind == "mlp" or last.attention.kv_bytes_per_token
    }
    if family.name in WITHOUT:
        pytest.skip("its keys and values cannot be written alone")
    original = model(ids, attention_mask=mask).logits[:, -1]
    with skip(model, Plan(prefill=skipped)), prompt(model, TOKENS):
        found = model(ids, attention_mask=mask).logits[:, -1]
    assert float((found - original).abs().max() / original.abs().max()) < FREE


def tiny(layers=6, **more):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
    }
    ends = {"eos_token_id": None, "pad_token_id": 0}
    config = LlamaConfig(
        **sizes, **ends, num_hidden_layers=layers, num_key_value_heads=2, **more
    )
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        weight.data.mul_(3 if weight.dim() > 1 else 1)
    return model


def generated(model, ids, mask, **how):
    how = {"max_new_tokens": NEW, "do_sample": False} | how
    return model.generate(
        ids,
        attention_mask=mask,
        output_logits=True,
        return_dict_in_generate=True,
        **how,
    )


@torch.no_grad()
def test_generate_declares_its_prompt():
    model, (ids, mask) = tiny(), ids_and_mask()
    plan = deep(model, last_tokens=2)
    step, seen = in_two_calls(model, plan, ids, mask), mask
    steps = [step.logits[:, -1]]
    for _ in range(NEW - 1):
        token = steps[-1].argmax(-1, keepdim=True)
        seen = torch.cat([seen, torch.ones_like(token)], 1)
        step = model(token, attention_mask=seen, use_cache=True, **cached(model, step))
        steps.append(step.logits[:, -1])
    with skip(model, plan):
        found = generated(model, ids, mask)
    assert close(torch.stack(found.logits), torch.stack(steps))


@torch.no_grad()
def test_a_declaration_ends_with_its_with():
    model, (ids, mask) = tiny(), ids_and_mask()
    whole = model(ids, attention_mask=mask).logits
    with skip(model, deep(model)):
        with prompt(model, ids.shape[1]):
            declared = model(ids, attention_mask=mask).logits
        after = model(ids, attention_mask=mask).logits
    assert not close(declared, whole)
    assert close(after, whole)


@pytest.mark.parametrize(
    "how",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 5},
        {"prefill_chunk_size": 1},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda how: next(iter(how)),
)
@torch.no_grad()
def test_caches_and_ways_to_generate_agree(how):
    model, (ids, mask) = tiny(), ids_and_mask()
    if "prefill_chunk_size" in how and not TRANSFORMERS_5:
        mask = torch.ones_like(
            mask
        )  # there a padded prompt in chunks is another one, without a skip too
    if "prompt_lookup_num_tokens" in how and not TRANSFORMERS_5:
        pytest.skip("transformers 4 wants a token that ends texts")
    if "prompt_lookup_num_tokens" in how:
        ids, mask = ids[:1, PADDING:], mask[:1, PADDING:]
        ids = torch.cat([ids, ids], 1)  # something to look up
        mask = torch.ones_like(ids)
    with skip(model, deep(model, last_tokens=2)):
        plain, found = generated(model, ids, mask), generated(model, ids, mask, **how)
    assert torch.equal(plain.sequences, found.sequences)
    if len(found.logits) == len(plain.logits):
        assert close(torch.stack(found.logits), torch.stack(plain.logits))


@torch.no_grad()
def test_assistant_checks_several_tokens_that_are_no_prompt():
    model, (ids, _) = tiny(), ids_and_mask()
    assistant = tiny(layers=2)
    ids = ids[:1]
    mask = torch.ones_like(ids)
    with skip(model, deep(model)):
        plain = generated(model, ids, mask)
        assisted = generated(model, ids, mask, assistant_model=assistant)
    assert torch.equal(plain.sequences, assisted.sequences)


@torch.no_grad()
def test_beams_and_samples_share_the_prompt():
    model, (ids, mask) = tiny(), ids_and_mask()
    plan = deep(model)
    logits = in_two_calls(model, plan, ids, mask).logits
    with skip(model, plan):
        beams = generated(model, ids, mask, num_beams=3)
        drawn = generated(model, ids, mask, do_sample=True, num_return_sequences=3)
    for found in (beams, drawn):
        assert close(found.logits[0], logits[:, -1].repeat_interleave(3, 0))


@torch.no_grad()
def test_answers_are_whole_when_the_next_turn_begins():
    """A second `generate` with the first one's cache: of what was read and written,
    only the new prompt is skipped.
    """
    model, (ids, _) = tiny(), ids_and_mask()
    plan, ids = deep(model, last_tokens=2), ids[:1]
    with skip(model, plan):
        cache = {cache_argument(model): DynamicCache(config=model.config)}
        first = generated(model, ids, torch.ones_like(ids), **cache).sequences
        more = torch.cat([first, ids + 1], 1)
        second = generated(model, more, torch.ones_like(more), **cache)
    early = ids.shape[1] - 2
    with adding_nothing(model, plan):
        read = model(ids[:, :early], use_cache=True)
    read = model(first[:, early:-1], **cached(model, read))
    between = more[:, first.shape[1] - 1 : -2]
    with adding_nothing(model, plan):
        read = model(between, **cached(model, read))
    expected = model(more[:, -2:], **cached(model, read)).logits[:, -1]
    assert close(second.logits[0], expected)


@torch.no_grad()
def test_work_is_not_done_for_what_is_skipped():
    """Rows that each projection is given: all of them for keys and values, the last
    ones for all else.
    """
    model, (ids, _) = tiny(), ids_and_mask()
    rows: Counter[str] = Counter()

    def counting(name):
        def count(module, args):
            rows[name] += args[0].shape[1]

        return count

    with skip(model, Plan(prefill={"attention": [4], "mlp": [4], "last_tokens": 2})):
        for name, module in model.model.layers.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(counting(name))
        with prompt(model, TOKENS):
            model(ids)
    for name in (
        "self_attn.q_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ):
        assert (rows[f"3.{name}"], rows[f"4.{name}"]) == (TOKENS, 2)


@torch.no_grad()
def test_every_token_and_the_prompt_at_once():
    """A plan of both parts: what is skipped for every token is gone, the rest as with
    the prompt's part alone.
    """
    model, (ids, mask) = tiny(), ids_and_mask()
    both = Plan(attention=[1], mlp=[3, 4], prefill={"attention": [3, 5], "mlp": [2, 5]})
    fewer = Plan(attention=both.attention, mlp=both.mlp)
    with skip(model, both), prompt(model, TOKENS):
        found = model(ids, attention_mask=mask).logits[:, -1]
    with (
        skip(model, fewer),
        skip(model, Plan(prefill=both.prefill)),
        prompt(model, TOKENS),
    ):
        nested = model(ids, attention_mask=mask).logits[:, -1]
    assert torch.equal(found, nested)
    early = TOKENS - 1
    with adding_nothing(model, both), skip(model, fewer):
        read = model(ids[:, :early], attention_mask=mask[:, :early], use_cache=True)
    with skip(model, fewer):
        expected = model(
            ids[:, early:], attention_mask=mask, **cached(model, read)
        ).logits[:, -1]
    assert close(found, expected)


@torch.no_grad()
def test_static_cache_of_more_places_than_tokens():
    model, (ids, _) = tiny(attn_implementation="sdpa"), ids_and_mask()
    plan = deep(model, last_tokens=1)
    with skip(model, plan), prompt(model, TOKENS):
        plain = model(ids).logits[:, -1]
        found = model(
            ids,
            **{
                cache_argument(model): StaticCache(
                    config=model.config, max_cache_len=40
                )
            },
        ).logits[:, -1]
    assert close(found, plain)


def test_a_prompt_has_tokens():
    with (
        pytest.raises(UsageError, match="prompt of 0 tokens"),
        prompt(tiny(layers=2), 0),
    ):
        pass
