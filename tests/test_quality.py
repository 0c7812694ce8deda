"""NLL, KL and agreement against their definitions, and the similarity of features."""

import gc
import math
import weakref

import pytest
import torch

from api import mean_and_error, quality
from families import family, silenced
from notall import Plan, evaluate, measure_similarity

BATCHES = list((torch.arange(6 * 9).view(6, 9) * 7 % 90 + 3).split(4))
PLAN = Plan(attention=[1], mlp=[2])


@pytest.fixture(scope="module")
def model():
    return family("llama").build()


@torch.no_grad()
def slow(model):
    """Token by token, from probabilities, on the plain model with its sublayers
    silenced.
    """
    rows = []
    for ids in torch.cat(BATCHES):
        dense = model(ids[None]).logits[0].double().softmax(-1)
        with silenced(model, family("llama"), PLAN.attention, PLAN.mlp):
            ours = model(ids[None]).logits[0].double().softmax(-1)
        nll = [-math.log(ours[t, ids[t + 1]]) for t in range(len(ids) - 1)]
        base = [-math.log(dense[t, ids[t + 1]]) for t in range(len(ids) - 1)]
        kl = [
            float((dense[t] * (dense[t] / ours[t]).log()).sum())
            for t in range(len(ids) - 1)
        ]
        same = [
            float(dense[t].argmax() == ours[t].argmax()) for t in range(len(ids) - 1)
        ]
        rows.append([sum(values) / len(values) for values in (nll, base, kl, same)])
    return list(zip(*rows))


def test_quality_is_what_its_definitions_say(model):
    nll, base, kl, same = slow(model)
    dense, found = evaluate(model, [Plan(), PLAN], BATCHES)
    assert found.nll == pytest.approx(sum(nll) / 6, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(sum(nll) / 6), rel=1e-5)
    delta, error = mean_and_error([a - b for a, b in zip(nll, base)])
    assert (found.delta_nll, found.delta_nll_se) == pytest.approx(
        (delta, error), rel=1e-4
    )
    assert found.kl == pytest.approx(sum(kl) / 6, rel=1e-4)
    assert found.top1_agreement == pytest.approx(sum(same) / 6)
    assert found.sequences == 6
    assert (dense.delta_nll, dense.kl, dense.top1_agreement) == (0, 0, 1)


def test_mean_and_error_by_hand():
    assert mean_and_error([1.0, 2.0, 6.0]) == pytest.approx(
        (3.0, math.sqrt((4 + 1 + 9) / 2 / 3))
    )
    assert (
        mean_and_error([1e200, -1e200])
        == mean_and_error([1e308, 1e308])
        == (math.inf, math.inf)
    )
    mean, error = mean_and_error([5.0])
    assert mean == 5.0
    assert math.isnan(error)


@torch.no_grad()
def test_similarity_of_blocks_is_that_of_the_models_own_hidden_states(model):
    states = model(torch.cat(BATCHES), output_hidden_states=True).hidden_states
    last = []
    handle = model.model.norm.register_forward_pre_hook(
        lambda _, args: last.append(args[0])
    )
    model(torch.cat(BATCHES))
    handle.remove()
    states = [*states[:-1], last[0]]  # the last one before the final norm
    found = {(row.layer, row.kind): row for row in measure_similarity(model, BATCHES)}
    for layer, (before, after) in enumerate(zip(states, states[1:])):
        by_hand = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        mean, error = mean_and_error(
            by_hand.mean(dim=-1).tolist()
        )  # over sequences: tokens of one are not independent
        assert found[layer, "block"].cosine == pytest.approx(mean, abs=1e-5)
        assert found[layer, "block"].cosine_se == pytest.approx(error, rel=1e-3)
    assert len(found) == 3 * len(states[1:])


def test_similarity_keeps_one_blocks_states(monkeypatch):
    """The states alive at once do not grow with depth."""
    model = family("llama").build(num_hidden_layers=12)
    alive, most, walked = [], 0, quality.walk

    def counting(net, look, **inputs):
        def looking(passage):
            nonlocal most
            alive.append(weakref.ref(passage.after))
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))
            look(passage)

        walked(net, looking, **inputs)

    monkeypatch.setattr(quality, "walk", counting)
    gc.collect()
    gc.freeze()  # else each collection walks whatever the tests before this one left
    try:
        measure_similarity(model, BATCHES)
    finally:
        gc.unfreeze()
    assert most <= 3  # of this block, of the one before, and what went into that
