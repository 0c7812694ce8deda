"""Text that the original model writes itself is drawn from its own distributions, and
once.
"""

from __future__ import annotations

import pytest
import torch

from api import (
    GENERATED_AT_ONCE,
    GIVEN_TOKENS,
    Provenance,
    repair_texts,
    sample,
    sampled,
)
from families import family
from notall import UsageError

PROMPTS = torch.arange(3 * 5).view(3, 5) * 7 % 90 + 3
ABOUT = Provenance(what={"model": "tiny", "text": "a book"})


def windows(rows=6, tokens=20):
    ids = torch.randint(
        3, 99, (rows, tokens), generator=torch.Generator().manual_seed(1)
    )
    return list(ids.split(4))


@torch.no_grad()
def by_hand(model, prompts, new, seed):
    torch.manual_seed(seed)
    for _ in range(new):
        chances = model(prompts, use_cache=False).logits[:, -1].float().softmax(-1)
        prompts = torch.cat([prompts, torch.multinomial(chances, 1)], 1)
    return prompts


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_it_is_drawn_token_by_token_whatever_the_model_would_rather_do(name):
    model = family(name).build()
    expected = by_hand(model, PROMPTS, 12, seed=3)
    ends = int(expected[0, 7])  # a text ends in the middle, and another one begins
    own = model.generation_config
    own.temperature, own.top_k, own.top_p, own.repetition_penalty, own.eos_token_id = (
        0.1,
        2,
        0.3,
        3.0,
        ends,
    )
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert torch.equal(sample(model, PROMPTS, 12, seed=3), expected)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(sample(model, PROMPTS, 12, seed=4), expected)


def test_windows_begin_as_the_texts_do_and_are_drawn_once(tmp_path, monkeypatch):
    model, batches = family("llama").build(), windows(GENERATED_AT_ONCE + 3)
    found = sampled(model, batches, tmp_path, ABOUT, seed=5)
    assert [one.shape for one in found] == [one.shape for one in batches]
    rows, given = torch.cat(found), torch.cat(batches)[:, :GIVEN_TOKENS]
    assert torch.equal(
        rows[:GENERATED_AT_ONCE], sample(model, given[:GENERATED_AT_ONCE], 12, seed=5)
    )
    assert torch.equal(
        rows[GENERATED_AT_ONCE:], sample(model, given[GENERATED_AT_ONCE:], 12, seed=6)
    )
    with monkeypatch.context() as patched:
        patched.setattr(
            repair_texts, "sample", lambda *_, **__: pytest.fail("it was drawn again")
        )
        assert all(
            map(torch.equal, sampled(model, batches, tmp_path, ABOUT, seed=5), found)
        )
    others = (
        (batches, ABOUT, 6),
        (windows(GENERATED_AT_ONCE + 2), ABOUT, 5),
        (batches, Provenance(what={"model": "other"}), 5),
    )
    for number, (text, about, seed) in enumerate(others, 2):
        sampled(model, text, tmp_path, about, seed=seed)
        assert len(list(tmp_path.glob("sampled-*.safetensors"))) == number


def test_what_is_damaged_is_one_line(tmp_path):
    model = family("llama").build()
    sampled(model, windows(), tmp_path, ABOUT)
    next(tmp_path.iterdir()).write_bytes(b"torn")
    with pytest.raises(
        UsageError, match=r"is damaged \(.*\): delete it, and run again"
    ):
        sampled(model, windows(), tmp_path, ABOUT)


def test_windows_longer_than_the_model_are_refused(tmp_path):
    with pytest.raises(UsageError, match="64 positions"):
        sampled(family("llama").build(), windows(2, 80), tmp_path, ABOUT)
