"""Windows that are fitted to, chosen by and measured on are drawn apart: by their
places, and by their tokens.
"""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings, strategies as st

from api import COPIED_TOKENS, Text, by_count, draw, kl, overlapping
from families import family
from notall import Plan, SearchConfig, Space, UsageError, choose_plan, heal, locate
from test_texts import TOKENIZER, numbers_tokenizer

pytestmark = pytest.mark.any_transformers  # it cuts texts into tokens, for no model


def text_of(tokens: list[int], name: str = "a text") -> Text:
    content = " ".join(map(str, tokens))
    return Text(name, hashlib.sha256(content.encode()).hexdigest(), content)


def share_a_run(one: list[int], other: list[int]) -> bool:
    """Half of the shorter window, or `COPIED_TOKENS` tokens, or all of it: every run of one in
    every place of the other.
    """
    shorter = min(len(one), len(other))
    size = min(shorter, max(COPIED_TOKENS, (shorter + 1) // 2))
    places = [range(len(row) - size + 1) for row in (one, other)]
    return any(
        one[i : i + size] == other[j : j + size] for i in places[0] for j in places[1]
    )


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 6),
    others=st.lists(st.integers(2, 90), max_size=3),
    length=st.integers(2, 90),
    words=st.integers(1, 40),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_runs_are_found_as_by_looking_at_every_place(
    rows, others, length, words, seed, data
):
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randint(
        words, (400,), generator=generator
    )  # of few words, so that runs come again

    def window(tokens: int) -> torch.Tensor:
        start = data.draw(st.integers(0, 400 - tokens))
        return stream[start : start + tokens]

    some = torch.stack([window(length) for _ in range(rows)])
    among = [window(tokens)[None] for tokens in others]
    found = overlapping(some, among).tolist()
    assert found == [
        any(share_a_run(row, one[0].tolist()) for one in among) for row in some.tolist()
    ]


@pytest.mark.parametrize(("shared", "overlap"), [(32, False), (33, True)])
def test_half_of_an_odd_window_is_the_larger_half(shared, overlap):
    one = torch.arange(65)
    other = torch.cat([one[:shared], torch.arange(100, 165 - shared)])
    assert overlapping(one[None], [other[None]]).tolist() == [overlap]


def test_windows_of_texts_without_a_run_in_common_do_not_overlap():
    rows = torch.arange(512).view(2, 256)
    other = torch.arange(1000, 1512).view(2, 256)
    assert overlapping(rows, [other]).tolist() == [False, False]
    other[1, 100:228] = rows[1, :128]  # half of it
    assert overlapping(rows, [other]).tolist() == [False, True]
    other[1, 100] = 7777
    assert overlapping(rows, [other]).tolist() == [False, False]
    assert overlapping(rows, [rows[:1, 200:]]).tolist() == [
        True,
        False,
    ]  # a shorter one that lies in it
    assert overlapping(rows, []).tolist() == [False, False]


CUTS = {
    "the same": lambda tokens: tokens,
    "with a title": lambda tokens: [7, 8, 9, *tokens],
    "the second half": lambda tokens: tokens[len(tokens) // 2 :],
    "twice": lambda tokens: tokens * 2,
    "another": lambda tokens: [token + 500 for token in tokens],
}


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(40, 400),
    cut=st.sampled_from([*CUTS]),
    lengths=st.tuples(*[st.integers(2, 40)] * 3),
    counts=st.tuples(*[st.integers(1, 6)] * 3),
    seeds=st.tuples(*[st.integers(0, 3)] * 3),
    repeats=st.booleans(),
    with_bos=st.booleans(),
)
def test_windows_that_are_drawn_apart_share_no_place_and_no_run(
    tokens, cut, lengths, counts, seeds, repeats, with_bos
):
    stream = [(number * 37 % 23 if repeats else number) for number in range(tokens)]
    texts = text_of(stream), text_of(CUTS[cut](stream), "a copy"), text_of(stream)
    tokenizer, drawn = numbers_tokenizer(starts_with_bos=with_bos), []
    for text, length, count, seed in zip(texts, lengths, counts, seeds):
        some = draw(
            tokenizer,
            text,
            sequences=count,
            length=length,
            seed=seed,
            apart=drawn,
            fewer=True,
        )
        assert len(some) <= count
        drawn.append(some)
    for number, one in enumerate(drawn):
        for other in drawn[:number]:
            assert not any(
                share_a_run(a, b)
                for a in one.rows.tolist()
                for b in other.rows.tolist()
            )
            if one.text.sha256 == other.text.sha256:
                held = [
                    {s + i for s in each.starts.tolist() for i in range(each.width)}
                    for each in (one, other)
                ]
                assert not held[0] & held[1]


def test_a_text_that_is_used_up_says_so_and_what_to_do():
    text = text_of([*range(100)])
    own = draw(TOKENIZER, text, sequences=8, length=10)
    others = draw(TOKENIZER, text, sequences=4, length=10, apart=[own], fewer=True)
    assert len(others) == 2
    with pytest.raises(
        UsageError,
        match=(
            "only 2 of them overlap none that is used already, where 4 are needed:"
            " lower"
        ),
    ):
        draw(TOKENIZER, text, sequences=4, length=10, apart=[own])


def test_without_others_the_order_is_that_of_the_seed_alone():
    """So that figures of what was never wrong stay what they were."""
    text = text_of([*range(500)])
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    own = draw(TOKENIZER, text, sequences=20, length=10, seed=3)
    rest = draw(TOKENIZER, text, sequences=30, length=10, seed=3, apart=[own])
    assert torch.equal(own.starts, order[:20] * 10)
    assert torch.equal(rest.starts, order[20:] * 10)
    assert torch.equal(own.rows, own.starts[:, None] + torch.arange(10))


# --- windows that a program of one's own gives
# --------------------------------------------------------------------------------------


def stream(first: int, tokens: int = 64) -> torch.Tensor:
    """A run of a text in which no token comes twice, (1, tokens)."""
    return torch.arange(first, first + tokens)[None]


OVERLAPS = {
    "the same batch": [stream(100)],
    "the same window in another batch": [torch.cat([stream(400), stream(100)])],
    "windows half a window on": [stream(132)],
    "a shorter window": [stream(110, 40)],
    "a longer window": [stream(0, 256)],
}


@pytest.fixture(scope="module")
def model():
    return family("llama").build(vocab_size=700, max_position_embeddings=256)


@pytest.mark.parametrize("held_out", [*OVERLAPS.values()], ids=[*OVERLAPS])
def test_heal_and_choose_plan_refuse_to_hold_out_what_they_use(model, held_out):
    batches, plan = [stream(100), stream(200)], Plan([1])
    with pytest.raises(
        UsageError,
        match=(
            r"window [01] of held_out overlaps one that is trained on, by half .*: hold"
        ),
    ):
        heal(model, plan, batches, held_out)
    space = Space(locate(model), "attention")
    given = (model, "deepest", space, by_count(space, 1))
    config = SearchConfig(held_out=held_out)
    with pytest.raises(
        UsageError,
        match=(
            r"window [01] of held_out overlaps one that the plan is chosen by, by half"
        ),
    ):
        choose_plan(*given, batches, config=config)
    with pytest.raises(
        UsageError, match="chosen by"
    ):  # by another text than that of the criterion
        choose_plan(*given, [stream(500)], kl(batches), config)


def test_heal_and_choose_plan_take_windows_of_other_places(model):
    batches, held_out = (
        [stream(100), stream(164)],
        [
            stream(228),
            stream(33),
            stream(150, 10) + 300,
        ],
    )
    heal(model, Plan([1]), batches, held_out)
    space = Space(locate(model), "attention")
    config, budget = SearchConfig(held_out=held_out), by_count(space, 1)
    chosen = choose_plan(model, "deepest", space, budget, batches, config=config)
    assert chosen.held_out
