"""What the packed tree holds, against each sequence alone; and that no model is packed
that computes otherwise.
"""

import random
import warnings

import pytest
import torch

from api import Pack, Request, Scorer, inputs_of, packed, packing_plain as plain
from families import WINDOW, each_block, family, representatives
from notall import Plan, UsageError

pytestmark = pytest.mark.any_transformers  # of batches and memory


def questions(count, seed, *, shared=6, own=4, answers=3, vocabulary=90):
    """Sequences as benchmarks have them: all begin alike, groups go on alike, then each
    has an end of its own.
    """
    draw = random.Random(seed)

    def some(n):
        return tuple(draw.randrange(3, vocabulary) for _ in range(n))

    examples = some(shared)
    found = []
    for _ in range(count):
        question = examples + some(own)
        found += [
            Request((question + (answer := some(draw.randint(1, 4))))[:-1], answer)
            for _ in range(answers)
        ]
    return found


def test_every_sequence_is_a_path_and_each_token_sees_its_own_path_only():
    sequences = {request.sequence for request in questions(7, seed=1)}
    packs = list(packed(sequences))
    assert sorted(path for pack in packs for path in pack.paths) == sorted(sequences)
    assert sum(map(len, packs)) < sum(map(len, sequences)) / 2
    for pack in packs:
        seen = pack.sight(len(pack) + 2)
        for sequence, path in pack.paths.items():
            assert [pack.tokens[i] for i in path] == list(sequence)
            assert [pack.positions[i] for i in path] == list(range(len(sequence)))
            for depth, i in enumerate(path):
                assert seen[i].nonzero()[:, 0].tolist() == sorted(path[: depth + 1])
        assert seen[-1].nonzero()[:, 0].tolist() == [len(pack) + 1]  # padding


def test_a_sequence_that_another_one_begins_with_takes_no_tokens():
    (pack,) = packed([(5, 6, 7), (5, 6, 7, 8), (5, 6)])
    assert pack.tokens == [5, 6, 7, 8]


def test_sequences_without_a_common_beginning_are_not_packed():
    found = packed([(9, 1, 2, 3, 4), (8, 1, 2, 3, 4)])
    assert [list(pack.paths) for pack in found] == [
        [(8, 1, 2, 3, 4)],
        [(9, 1, 2, 3, 4)],
    ]


def test_a_pack_stays_within_reach_of_its_longest_path():
    draw = random.Random(0)
    packs = list(
        packed({(1, 2, *(draw.randrange(9) for _ in range(6))) for _ in range(500)})
    )
    assert len(packs) > 1
    assert max(map(len, packs)) <= 2 * 8 + 256
    few = list(packed({path for pack in packs for path in pack.paths}, most=20))
    assert max(map(len, few)) <= 20
    assert len(few) > len(packs)


def test_packs_of_one_path_need_neither_mask_nor_positions():
    assert inputs_of(list(plain([(4, 5, 6), (7,)])), torch.float32).keys() == {
        "input_ids"
    }
    empty = Pack()
    empty.add((4, 5, 6))
    assert inputs_of([empty], torch.float32)["input_ids"].tolist() == [[4, 5, 6]]


def scored(scorer, plans, requests):
    """(plans, requests): log-likelihoods, and whether they are greedy."""
    values = torch.zeros(len(plans), len(requests), dtype=torch.float64)
    greedy = torch.zeros(len(plans), len(requests), dtype=torch.bool)
    for scores in scorer.score(plans, requests):
        values[:, scores.requests], greedy[:, scores.requests] = (
            scores.log_likelihoods,
            scores.greedy,
        )
    return values, greedy


def one_by_one(model, requests):
    """The slow twin: each request in a forward pass of its own."""
    rows = []
    with torch.no_grad():
        for sequence, continuation in (
            (request.sequence, request.continuation) for request in requests
        ):
            logits = (
                model(input_ids=torch.tensor([sequence]))
                .logits[0, -len(continuation) :]
                .log_softmax(-1)
            )
            wanted = torch.tensor(continuation)
            greedy = bool((logits.argmax(-1) == wanted).all())
            rows.append((float(logits.gather(1, wanted[:, None]).sum()), greedy))
    return rows


def build(tested):
    try:
        return tested.build("sdpa")
    except ValueError:  # it has none
        return tested.build("eager")


@each_block(representatives(), "tested")
def test_scores_equal_one_by_one_on_every_structure(tested):
    model = build(tested)
    requests = questions(3, seed=2, shared=WINDOW + 3)
    scorer = Scorer(model, batch_size=2)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        values, greedy = scored(scorer, [Plan()], requests)
    for number, (value, is_greedy) in enumerate(one_by_one(model, requests)):
        assert float(values[0, number]) == pytest.approx(value, abs=1e-4)
        assert bool(greedy[0, number]) == is_greedy


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox", "olmo2"])
def test_what_can_be_packed_is_packed(name, attention):
    model = family(name).build(attention)
    scorer = Scorer(model)
    requests = questions(20, seed=3)
    scored(scorer, [Plan()], requests)
    assert scorer.packs
    alone = Scorer(model)
    alone.packs = False
    scored(alone, [Plan()], requests)
    assert alone.tokens == alone.plain_tokens == scorer.plain_tokens
    assert scorer.tokens < 0.6 * alone.tokens


def test_a_model_that_computes_otherwise_when_packed_is_not_packed():
    model = family("gpt_neo").build()
    scorer = Scorer(model)
    with pytest.warns(
        UserWarning, match="one by one, not packed: packed, a log-likelihood differs by"
    ):
        scored(scorer, [Plan()], questions(2, seed=4))
    assert not scorer.packs


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_a_model_that_takes_no_positions_is_not_packed(name):
    assert not Scorer(family(name).build()).packs


def test_only_sequences_within_the_window_are_packed():
    model = family("mistral").build()
    scorer = Scorer(model)
    scored(scorer, [Plan()], questions(2, seed=5, shared=WINDOW))
    assert scorer.tokens == scorer.plain_tokens
    scored(scorer, [Plan()], questions(20, seed=5, shared=1, own=1, answers=6))
    assert scorer.tokens < scorer.plain_tokens
    assert scorer.packs


def test_no_pack_is_longer_than_the_context(monkeypatch):
    model = family("llama").build("sdpa")
    requests, widths, run = questions(30, seed=9, shared=20), [], Scorer._run

    def noting(self, replay, packs, *rest):
        widths.extend(map(len, packs))
        return run(self, replay, packs, *rest)

    monkeypatch.setattr(Scorer, "_run", noting)
    scored(Scorer(model), [Plan()], requests)
    assert 40 < max(widths) <= model.config.max_position_embeddings


PLANS = [
    Plan(),
    Plan(attention=[3]),
    Plan(attention=[2, 3], mlp=[3]),
    Plan(mlp=[0]),
    Plan(attention=[3]),
]


@pytest.fixture
def model():
    return family("llama").build("sdpa")


def test_all_plans_at_once_equal_each_inside_skip(model):
    from notall import skip

    requests = questions(4, seed=6)
    values, greedy = scored(Scorer(model), PLANS, requests)
    for row, plan in enumerate(PLANS):
        with skip(model, plan):
            expected = one_by_one(model, requests)
        assert values[row].tolist() == pytest.approx(
            [value for value, _ in expected], abs=1e-4
        )
        assert greedy[row].tolist() == [is_greedy for _, is_greedy in expected]


@pytest.mark.parametrize(
    "room", [pytest.param(30, marks=pytest.mark.slow), 10]
)  # for two packs, or not even for one
@pytest.mark.parametrize(
    "batch_size", ["auto", *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))]
)
def test_running_out_of_memory_halves_the_batch_and_loses_nothing(
    model, batch_size, room, monkeypatch
):
    requests = questions(15, seed=7, shared=1)
    expected, _ = scored(Scorer(model), [Plan()], requests)
    refused, run = [], Scorer._run

    def in_little_memory(self, replay, packs, *rest):
        if len(packs) * max(map(len, packs)) > room:
            refused.append(len(packs))
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return run(self, replay, packs, *rest)

    monkeypatch.setattr(Scorer, "_prove", lambda *_: None)
    monkeypatch.setattr(Scorer, "_run", in_little_memory)
    found, _ = scored(Scorer(model, batch_size), [Plan()], requests)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert refused or (batch_size, room) == (1, 30)


def test_one_sequence_too_many_for_the_memory_is_said_in_a_line(model, monkeypatch):
    def never(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Scorer, "_prove", lambda *_: None)
    monkeypatch.setattr(Scorer, "_run", never)
    with pytest.raises(
        UsageError,
        match=r"^one sequence of \d+ tokens takes more memory .* give a smaller dtype",
    ):
        list(Scorer(model).score([Plan()], questions(2, seed=8)))


def test_other_failures_are_not_taken_for_a_lack_of_memory(model, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Scorer, "_prove", lambda *_: None)
    monkeypatch.setattr(Scorer, "_run", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        list(Scorer(model).score([Plan()], questions(2, seed=8)))


def test_a_batch_size_of_none_is_refused(model):
    with pytest.raises(UsageError, match="batch size 0"):
        Scorer(model, 0)
