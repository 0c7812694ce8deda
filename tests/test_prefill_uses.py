"""Timing, tasks and diagnostics of plans that skip in the prompt alone."""

import pytest
import torch

from api import PageStep, Request, Scorer, Workload, check_texts, speed, time_plans
from families import family
from notall import Plan, UsageError, skip
from test_prefill_quality import logits_behind

PLAN = Plan(prefill={"attention": [2], "mlp": [2, 3]})
PLANS = [
    Plan([1]),
    PLAN,
    Plan(prefill={"attention": [1], "mlp": [1], "last_tokens": 3}),
]


@pytest.fixture(scope="module")
def model():
    return family("llama").build()


# --- timing
# --------------------------------------------------------------------------------------


def test_the_prompt_that_is_timed_is_declared(model, monkeypatch):
    """How many tokens each MLP saw, of the prompt and of each step behind it."""

    seen, once = [], speed.time_once

    def watched(*args):
        rows = {}
        hooks = [
            layer.mlp.down_proj.register_forward_hook(
                lambda m, args, _, index=index: rows.setdefault(index, []).append(
                    args[0].shape[1]
                )
            )
            for index, layer in enumerate(dense)
        ]
        seen.append(rows)
        try:
            return once(*args)
        finally:
            for hook in hooks:
                hook.remove()

    dense = list(model.model.layers)
    monkeypatch.setattr(speed, "time_once", watched)
    workload = Workload(prompt_tokens=9, generation_tokens=2, rounds=1)
    times = time_plans(model, {"one": PLAN}, workload)
    assert times.keys() == {"dense", "one"}
    whole, skipped = [9, 1, 1], [1, 1, 1]
    assert {0: whole, 1: whole, 2: skipped, 3: skipped} in seen
    assert dict.fromkeys(range(4), whole) in seen


def test_a_prompt_of_which_nothing_is_skipped_is_not_timed(model):

    plan = Plan(prefill={"mlp": [1], "last_tokens": 9})
    with pytest.raises(
        UsageError, match="nothing is skipped where its last 9 run whole"
    ):
        time_plans(
            model,
            {"one": plan},
            Workload(prompt_tokens=9, generation_tokens=2, rounds=1),
        )


# --- scoring
# --------------------------------------------------------------------------------------


def requests():
    """Of four prompts, two as long as each other, and two that begin alike: some with
    several continuations.
    """
    some = torch.Generator().manual_seed(2)

    def tokens(count):
        return torch.randint(3, 90, (count,), generator=some).tolist()

    prompts = [tokens(7), tokens(7), shot := tokens(9), [*shot, *tokens(4)]]
    ends = [tokens(count) for count in (1, 3, 2)]
    return [
        Request((*prompt, *end)[:-1], tuple(end))
        for prompt in map(tuple, prompts)
        for end in ends
    ]


def slowly(model, plan, request):
    """The log-likelihood of the continuation by the two calls of a model, one request
    at a time.
    """
    whole = torch.tensor([[*request.sequence, request.continuation[-1]]])
    cut = whole.shape[1] - len(request.continuation)
    if not plan.prefill:
        with torch.no_grad(), skip(model, plan):
            logits = model(input_ids=whole).logits[:, cut - 1 : -1].double()
    else:
        logits = logits_behind(model, plan, cut, whole)
    likely = logits.log_softmax(-1)[0].gather(1, whole[0, cut:, None]).sum()
    return float(likely), bool((logits.argmax(-1)[0] == whole[0, cut:]).all())


@pytest.mark.parametrize("batch_size", ["auto", 1])
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi"])
def test_a_continuation_is_whole_and_what_is_ahead_of_it_the_prompt(name, batch_size):
    model, asked = family(name).build(), requests()
    found = {}
    for scores in Scorer(model, batch_size).score(PLANS, asked):
        for place, number in enumerate(scores.requests):
            found[number] = (
                scores.log_likelihoods[:, place].tolist(),
                scores.greedy[:, place].tolist(),
            )
    assert sorted(found) == list(range(len(asked)))
    for number, request in enumerate(asked):
        for plan, value, is_greedy in zip(PLANS, *found[number]):
            expected = slowly(model, plan, request)
            assert value == pytest.approx(expected[0], abs=3e-4), (plan, request)
            assert is_greedy == expected[1]


def test_a_text_without_a_prompt_is_read_whole(model):
    text = tuple(range(5, 15))
    request = Request(text, (*text[1:], 7))  # one token ahead of what is scored
    (scores,) = Scorer(model).score([Plan(), PLAN], [request])
    assert scores.log_likelihoods[0] == pytest.approx(scores.log_likelihoods[1])


def test_continuations_of_one_prompt_are_packed(model):
    scorer, asked = Scorer(model), requests()
    list(scorer.score(PLANS, asked))
    assert scorer.packs
    assert scorer.tokens < scorer.plain_tokens


# --- diagnostics
# --------------------------------------------------------------------------------------


def test_long_texts_are_judged_behind_half_of_each_window(model):
    windows = [
        torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(n))
        for n in range(3)
    ]
    names = [[one.check for one in row] for row in check_texts(model, [PLAN], windows)]
    assert names == [["NLL at 19 to 38"], ["calibration error"]]
    assert [row[0].check for row in check_texts(model, [Plan([1])], windows)] == [
        "NLL at 0 to 38",
        "calibration error",
    ]


def test_a_step_of_a_page_says_what_the_prompt_skips():
    assert PageStep("one", PLAN).description == "3 sublayers skipped in the prompt."
    assert (
        PageStep("one", Plan([1], prefill={"mlp": [2]})).description
        == "1 sublayer skipped and 1 sublayer skipped in the prompt."
    )
