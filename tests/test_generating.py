"""Text of the skipped model: together as one at a time, and what makes no text refused
in one line.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from api import Streamer, continue_prompts, generate_text, greedy, raised_by
from families import family, silenced
from notall import Plan, UsageError
from tiny_tasks import byte_tokenizer, tiny_llama

PLAN = Plan([1], [2])
PROMPTS = ["the river", "old stone in", "a bird sings under the winter light of", "x"]
NEW = 6


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@torch.no_grad()
def slow(model, tokenizer, prompt, plan):
    """Greedy, without a cache, on the plain model with its sublayers silenced."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with silenced(model, family("llama"), plan.attention, plan.mlp):
        for _ in range(NEW):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize("plan", [Plan(), PLAN, Plan([0, 1, 2])], ids=str)
def test_prompts_together_are_continued_as_one_at_a_time(model, tokenizer, plan):
    """Padded on the left, so that positions and masks matter."""
    alone = [slow(model, tokenizer, prompt, plan) for prompt in PROMPTS]
    assert len(set(alone)) > 1
    assert continue_prompts(model, tokenizer, plan, PROMPTS, NEW) == alone
    for prompt, said in zip(PROMPTS, alone):
        assert generate_text(model, tokenizer, plan, prompt, max_new_tokens=NEW) == said


def test_the_text_is_handed_on_as_it_comes(model, tokenizer):
    class Spaced(type(tokenizer)):
        def decode(self, *ids, **options):
            return " ".join(super().decode(*ids, **options))

    spaced = byte_tokenizer()
    spaced.__class__ = Spaced  # a streamer waits for a space
    pieces, steps = [], []
    handle = model.register_forward_hook(lambda *_: steps.append(len(pieces)))
    said = generate_text(
        model,
        spaced,
        PLAN,
        "x",
        max_new_tokens=12,
        streamer=Streamer(spaced, pieces.append),
    )
    handle.remove()
    assert "".join(pieces) == said
    assert len(set(steps)) > 6


@pytest.mark.parametrize(
    ("name", "value"),
    [("bos_token_id", "a"), ("min_length", "a"), ("bos_token_id", 1e308)],
    ids=str,
)
def test_settings_that_cannot_be_used_are_one_line(tokenizer, name, value):
    model = tiny_llama()
    setattr(model.generation_config, name, value)
    with pytest.raises(
        UsageError,
        match=r"cannot generate: (Type|Runtime)Error: .*; check .* generation_config",
    ):
        generate_text(model, tokenizer, PLAN, "x", max_new_tokens=2, temperature=1.0)
    generate_text(
        model, tokenizer, PLAN, "x", max_new_tokens=2
    )  # greedy text goes by none of them


def test_an_end_that_is_no_token_is_one_line(tokenizer):
    model = tiny_llama()
    model.generation_config.eos_token_id = "a"
    for say in (generate_text, continue_prompts):
        prompt, new = (
            ("x", {"max_new_tokens": 2})
            if say is generate_text
            else (["x"], {"new_tokens": 2})
        )
        with pytest.raises(
            UsageError, match=r"cannot generate: .*; check .* generation_config"
        ):
            say(model, tokenizer, PLAN, prompt, **new)


@pytest.mark.parametrize("kind", [TypeError, RuntimeError])
def test_what_is_wrong_elsewhere_is_not_blamed_on_the_settings(
    tokenizer, monkeypatch, kind
):
    def mistaken(*_, **__):
        raise kind("a mistake of the test")

    model = tiny_llama()
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", mistaken)
    with pytest.raises(kind, match="a mistake of the test"):
        generate_text(model, tokenizer, Plan(), "x", max_new_tokens=2)


def test_only_a_number_that_is_too_large_is_a_runtime_error_of_the_settings():
    def ran_out(what):
        exec(
            compile(
                f"raise RuntimeError({what!r})",
                "/somewhere/transformers/generation.py",
                "exec",
            )
        )

    said = "cannot: RuntimeError: no int64 without overflow; do so"
    with (
        pytest.raises(UsageError, match=said),
        raised_by("transformers", "cannot", "do so"),
    ):
        ran_out("no int64 without overflow")
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        raised_by("transformers", "cannot", "do so"),
    ):
        ran_out("out of memory")


def test_greedy_is_greedy_whatever_the_model_would_rather_do(tokenizer):
    model = tiny_llama()
    expected = [slow(model, tokenizer, prompt, PLAN) for prompt in PROMPTS]
    own = model.generation_config
    (
        own.repetition_penalty,
        own.num_beams,
        own.num_return_sequences,
        own.no_repeat_ngram_size,
    ) = (1.3, 3, 2, 1)
    assert continue_prompts(model, tokenizer, PLAN, PROMPTS, NEW) == expected
    assert [
        generate_text(model, tokenizer, PLAN, prompt, max_new_tokens=NEW)
        for prompt in PROMPTS
    ] == expected
    assert model.generation_config is own


def test_a_row_ends_with_the_token_that_ends_a_text(model, tokenizer, monkeypatch):
    ids = torch.arange(10).view(2, 5) + 3
    whole = greedy(model, ids, 12)
    end = next(token for token in whole[0] if token not in whole[1])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [98, end])
    assert greedy(model, ids, 12) == [whole[0][: whole[0].index(end) + 1], whole[1]]


def test_the_random_numbers_of_others_go_on_as_they_would_have(model, tokenizer):
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    for temperature in (0.0, 1.0):
        generate_text(
            model, tokenizer, PLAN, "the", max_new_tokens=3, temperature=temperature
        )
        assert torch.equal(torch.random.get_rng_state(), state)


def test_the_seed_decides_what_is_drawn(model, tokenizer):
    first, again, other = (
        generate_text(
            model, tokenizer, PLAN, "the", max_new_tokens=20, temperature=5.0, seed=seed
        )
        for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ("", {}, "no tokens"),
        ("half a pair \udcff", {}, "not UTF-8"),
        ("the", {"max_new_tokens": 0}, "give 1 or more"),
        ("the", {"max_new_tokens": -3}, "give 1 or more"),
        ("the", {"max_new_tokens": 600}, "positions"),
        ("the " * 999, {}, "positions"),
        ("the", {"temperature": -1.0}, "give 0, or from 0.001"),
        ("the", {"temperature": float("nan")}, "give 0, or from 0.001"),
        ("the", {"temperature": float("inf")}, "give 0, or from 0.001"),
        ("the", {"temperature": 5e-324}, "give 0, or from 0.001"),
        ("the", {"chat": True}, "no chat template: leave chat out"),
    ],
)
def test_what_makes_no_text_is_refused_in_one_line(
    model, tokenizer, prompt, options, says
):
    with pytest.raises(UsageError, match=says) as error:
        generate_text(model, tokenizer, PLAN, prompt, **options)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content']",
        "{% raise %}",
        "{{ raise_exception('no\n\x1b[31m users') }}",
        "{{ messages[7].content.nothing }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% include 'other' %}",
        "{{ raise_exception('x' * 9999) }}",
        {"tool_use": "{{ messages }}"},
    ],
)
def test_a_broken_or_hostile_chat_template_is_refused_in_one_line(
    model, tokenizer, template
):
    tokenizer.chat_template = template
    with pytest.raises(UsageError, match="chat template fails") as error:
        generate_text(model, tokenizer, PLAN, "the", chat=True)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300
    assert "leave chat out" in str(error.value)


def test_a_chat_template_is_what_the_model_reads(model, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    )
    said = generate_text(
        model, tokenizer, PLAN, "the river", max_new_tokens=NEW, chat=True
    )
    tokenizer.chat_template = None
    assert said == generate_text(
        model, tokenizer, PLAN, "<s>user: the river</s>", max_new_tokens=NEW
    )
    assert said != generate_text(
        model, tokenizer, PLAN, "the river", max_new_tokens=NEW
    )


def test_a_chat_begins_with_the_bos_of_its_template_and_no_other(model):
    tokenizer, read = byte_tokenizer(adds_bos=True), []
    streamer = SimpleNamespace(put=read.append, end=lambda: None)
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    for chat in (True, False):
        generate_text(
            model,
            tokenizer,
            PLAN,
            "the river",
            max_new_tokens=1,
            chat=chat,
            streamer=streamer,
        )
        assert read[0].flatten().tolist() == tokenizer("the river")["input_ids"]
        read.clear()


def test_an_empty_chat_template_leaves_no_prompt(model, tokenizer):
    tokenizer.chat_template = "{# nothing #}"
    with pytest.raises(UsageError, match="no tokens"):
        generate_text(model, tokenizer, PLAN, "the", chat=True)
