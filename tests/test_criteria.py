"""Every criterion against a slow twin or a case by hand, and the faults that others
have been found to have.
"""

import math
import time

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from api import (
    CRITERIA,
    GENERATIONS,
    Evaluator,
    Setting,
    Space,
    build_empty,
    by_count,
    by_limit,
    choose,
    is_portable,
    kl,
    nll,
    replay,
    score_cosine,
    score_first_order,
    score_fisher,
    score_gate_norm,
    score_leave_one_out,
    score_random,
    score_relative_magnitude,
)
from families import family, silenced
from notall import UsageError, deepest, locate, skip
from test_searching import unshared

pytestmark = pytest.mark.any_transformers  # of sets and scores, on one model

BATCHES = list((torch.arange(6 * 9).view(6, 9) * 7 % 90 + 3).split(4))
LAYERS = 6


@pytest.fixture(scope="module")
def model():
    return family("llama").build(num_hidden_layers=LAYERS)


def setting(model, kind="sublayer", *, objective=nll, **space):
    return Setting(
        model,
        Space(locate(model), kind, **space),
        BATCHES,
        Evaluator(model, objective(BATCHES)),
    )


@torch.no_grad()
def slow_cost(model, skipped, objective="nll"):
    """One sequence at a time, on the plain model with its sublayers silenced."""
    plan = Space(locate(model)).plan(skipped)
    losses = []
    for ids in torch.cat(BATCHES):
        dense = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        with silenced(model, family("llama"), plan.attention, plan.mlp):
            logits = model(ids[None]).logits[0, :-1].double()
        if objective == "nll":
            losses.append(float(cross_entropy(logits, ids[1:])))
        else:
            losses.append(
                float((dense.exp() * (dense - logits.log_softmax(-1))).sum(-1).mean())
            )
    return sum(losses) / len(losses)


@torch.no_grad()
def streams(model):
    """The residual stream of a Llama around every sublayer and block, by hand:
    (sequences, tokens, hidden).
    """
    ids, found, caught = torch.cat(BATCHES), {}, {}
    handles = []
    for index, layer in enumerate(model.model.layers):
        for name, module in (("attn", layer.self_attn), ("mlp", layer.mlp)):

            def note(_, __, answer, key=f"{name}.{index}"):
                caught[key] = answer[0] if isinstance(answer, tuple) else answer

            handles.append(module.register_forward_hook(note))
    model(ids)
    for handle in handles:
        handle.remove()
    hidden = model.model.embed_tokens(ids)
    for index in range(len(model.model.layers)):
        before = hidden
        for name in (f"attn.{index}", f"mlp.{index}"):
            found[name,] = hidden, hidden + caught[name]
            hidden = hidden + caught[name]
        found[f"attn.{index}", f"mlp.{index}"] = before, hidden
    return found


def cosine(a, b):
    return (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)


@pytest.mark.parametrize("kind", ["attention", "mlp", "block", "sublayer"])
def test_feature_scores_are_their_formulas(model, kind):
    by_hand = streams(model)
    cosines, magnitudes = (
        score(setting(model, kind))
        for score in (score_cosine, score_relative_magnitude)
    )
    assert len(cosines) == LAYERS * (2 if kind == "sublayer" else 1)
    for unit in cosines:
        before, after = by_hand[unit]
        assert cosines[unit] == pytest.approx(
            float((1 - cosine(before, after)).mean()), abs=1e-5
        )
        ratio = (after - before).norm(dim=-1) / after.norm(dim=-1)
        assert magnitudes[unit] == pytest.approx(float(ratio.mean()), rel=1e-5)


def test_the_last_block_is_scored_before_the_final_norm(model):
    """Others read it behind the final norm: their score of the last block changes with
    that norm's weights.
    """
    wild = family("llama").build(num_hidden_layers=LAYERS)
    wild.model.norm.weight.data = torch.linspace(-30, 30, 32)
    for name in ("cosine", "magnitude"):
        scores = [CRITERIA[name].score(setting(m, "block")) for m in (model, wild)]
        assert scores[0] == scores[1]
    picked = [
        choose("angular", setting(m, "block"), by_count(Space(locate(m), "block"), 2))
        for m in (model, wild)
    ]
    assert picked[0] == picked[1]


@pytest.mark.parametrize("first", range(LAYERS - 1))
@pytest.mark.parametrize("name", ["angular", "cosine"])
def test_a_run_that_does_nothing_is_the_run_that_is_chosen(first, name):
    """Also where it ends with the last block, or begins with the first: others are off
    by one there.
    """
    planted = family("llama").build(num_hidden_layers=LAYERS)
    for index in (first, first + 1):
        planted.model.layers[index].self_attn.o_proj.weight.data.zero_()
        planted.model.layers[index].mlp.down_proj.weight.data.zero_()
    asked = setting(planted, "block")
    chosen = choose(name, asked, by_count(asked.space, 2))
    assert asked.space.plan(chosen.skipped).blocks == (first, first + 1)


def test_angular_is_its_formula_for_every_run(model):
    by_hand = streams(model)
    states = [by_hand[f"attn.{i}", f"mlp.{i}"] for i in range(LAYERS)]
    for count in (1, 2, 3, 4):
        angles = []
        for first in range(LAYERS - count + 1):
            before, after = states[first][0][:, -1], states[first + count - 1][1][:, -1]
            angles.append(float((cosine(before, after).arccos() / math.pi).mean()))
        asked = setting(model, "block")
        first = angles.index(min(angles))
        chosen = asked.space.plan(
            choose("angular", asked, by_count(asked.space, count)).skipped
        )
        assert chosen.blocks == tuple(range(first, first + count))


def test_angular_keeps_first_and_last(model):
    asked = setting(model, "block", keep_first=1, keep_last=1)
    chosen = asked.space.plan(
        choose("angular", asked, by_count(asked.space, LAYERS - 2)).skipped
    )
    assert chosen.blocks == tuple(range(1, LAYERS - 1))


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        answer = func(*args, **(kwargs or {}))
        for tensor in answer if isinstance(answer, (tuple, list)) else [answer]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return answer


@pytest.mark.skipif(
    transformers.__version__.startswith("4."),
    reason="transformers 4 makes a mask of that size itself",
)
def test_no_square_of_tokens_is_made_for_its_diagonal():
    long = family("llama").build(
        "sdpa", num_hidden_layers=2, max_position_embeddings=600
    )
    ids = torch.arange(600)[None] % 90 + 3
    asked = Setting(
        long, Space(locate(long), "block"), [ids], Evaluator(long, nll([ids]))
    )
    with Largest() as largest:
        score_cosine(asked)
    assert largest.elements < 600 * 600 / 2


@pytest.mark.parametrize("kind", ["sublayer", "block"])
def test_gradients_are_finite_differences_of_a_gate(model, kind):
    """h + gate * f(h), by scaling the output projections of a Llama: dL/dgate, sequence
    by sequence.
    """
    first, fisher = (
        score(setting(model, kind)) for score in (score_first_order, score_fisher)
    )
    weights = {
        f"attn.{i}": layer.self_attn.o_proj.weight
        for i, layer in enumerate(model.model.layers)
    }
    weights |= {
        f"mlp.{i}": layer.mlp.down_proj.weight
        for i, layer in enumerate(model.model.layers)
    }

    def losses(names, gate):
        kept = {name: weights[name].data for name in names}
        for name in names:
            weights[name].data = kept[name] * gate
        with torch.no_grad():
            found = [
                float(cross_entropy(model(row[None]).logits[0, :-1].double(), row[1:]))
                for row in torch.cat(BATCHES)
            ]
        for name in names:
            weights[name].data = kept[name]
        return torch.tensor(found, dtype=torch.float64)

    for unit in first:
        slopes = (losses(unit, 1.01) - losses(unit, 0.99)) / 0.02
        assert first[unit] == pytest.approx(-float(slopes.mean()), abs=3e-3)
        assert fisher[unit] == pytest.approx(
            float(slopes.square().mean()) / 2, rel=2e-2, abs=1e-3
        )


def test_gradients_of_parallel_blocks(model):
    """To first order, all gates of GPT-NeoX closed by a thousandth change the loss by
    that much.
    """
    net = family("gpt_neox").build()
    asked = Setting(
        net, Space(locate(net), "attention"), BATCHES, Evaluator(net, nll(BATCHES))
    )
    scores = score_first_order(asked)
    for index, layer in enumerate(net.gpt_neox.layers):
        dense = layer.attention.dense
        kept = dense.weight.data, dense.bias.data
        values = []
        for gate in (1.01, 0.99):
            dense.weight.data, dense.bias.data = kept[0] * gate, kept[1] * gate
            with torch.no_grad():
                values.append(
                    sum(
                        float(
                            cross_entropy(
                                net(row[None]).logits[0, :-1].double(), row[1:]
                            )
                        )
                        for row in torch.cat(BATCHES)
                    )
                )
        dense.weight.data, dense.bias.data = kept
        assert scores[f"attn.{index}",] == pytest.approx(
            -(values[0] - values[1]) / 0.02 / 6, abs=3e-3
        )


def test_gate_norm_is_the_norm_of_the_product_with_keys_repeated(model):
    scores = score_gate_norm(setting(model, "attention"))
    for index, layer in enumerate(model.model.layers):
        q, k = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        product = torch.zeros(32, 32)
        for head in range(4):
            product += (
                q[8 * head : 8 * head + 8].T @ k[8 * (head // 2) : 8 * (head // 2) + 8]
            )
        assert scores[f"attn.{index}",] == pytest.approx(
            product.norm().item(), rel=1e-5
        )


def test_gate_norm_says_what_it_cannot_rank(model):
    fused = family("gpt2").build()
    with pytest.raises(UsageError, match="no q_proj; take another criterion"):
        score_gate_norm(
            Setting(fused, Space(locate(fused), "attention"), BATCHES, None)
        )
    with pytest.raises(UsageError, match="attention only"):
        choose(
            "gate-norm",
            setting(model, "block"),
            by_count(Space(locate(model), "block"), 1),
        )


@pytest.mark.parametrize("objective", [nll, kl], ids=["nll", "kl"])
@pytest.mark.parametrize("kind", ["sublayer", "block"])
def test_leave_one_out_is_one_evaluation_a_unit(model, kind, objective):
    scores = score_leave_one_out(setting(model, kind, objective=objective))
    dense = slow_cost(model, (), objective.__name__)
    for unit, score in scores.items():
        assert score == pytest.approx(
            slow_cost(model, unit, objective.__name__) - dense, abs=1e-5
        )


@pytest.mark.parametrize("objective", [nll, kl], ids=["nll", "kl"])
@pytest.mark.parametrize(
    "kind",
    [
        "block",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("attention", "sublayer")
        ),
    ],
)
def test_greedy_is_the_published_algorithm(model, kind, objective):
    """SLEB, BlockPruner and FinerCut, written out: every candidate in full at every
    step.
    """
    asked = setting(model, kind, objective=objective)
    skipped = frozenset()
    for _ in range(3):
        left = [unit for unit in asked.space.units if not skipped.intersection(unit)]
        costs = {
            unit: slow_cost(model, skipped.union(unit), objective.__name__)
            for unit in left
        }
        skipped = skipped.union(min(costs, key=costs.__getitem__))
    chosen = choose("greedy", asked, by_count(asked.space, 3))
    assert chosen.skipped == skipped
    assert (
        frozenset(name for unit in chosen.order for name in unit) == skipped
    )  # and the order is known
    assert asked.evaluator.cost(skipped) == pytest.approx(
        slow_cost(model, skipped, objective.__name__), abs=1e-5
    )
    assert asked.evaluator.spent.executions < unshared(asked.evaluator)


def test_evolution_never_gets_worse_and_is_the_same_each_time(model):
    budget = by_count(Space(locate(model)), 4)
    chosen = [choose("evolution", setting(model), budget).skipped for _ in range(2)]
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 4
    assert slow_cost(model, chosen[0]) < min(
        slow_cost(model, _drawn(model, budget, seed)) for seed in range(5)
    )


def test_no_generation_of_an_evolution_is_worse_than_the_one_before(model, monkeypatch):
    """Its parent is among those that are compared on all of the text."""
    asked, best = setting(model), []
    costs = asked.evaluator.costs

    def noting(sets, share=1.0):
        found = costs(sets, share)
        if share == 1.0 and len(sets) > 1:
            best.append(min(found))
        return found

    monkeypatch.setattr(asked.evaluator, "costs", noting)
    chosen = choose("evolution", asked, by_count(asked.space, 4)).skipped
    assert len(best) == GENERATIONS
    assert best == sorted(best, reverse=True)
    assert asked.evaluator.cost(chosen) == best[-1]


def _drawn(model, budget, seed):
    one = setting(model)
    return choose(
        "random", Setting(model, one.space, BATCHES, one.evaluator, seed=seed), budget
    ).skipped


@pytest.mark.parametrize("kind", ["attention", "mlp", "block"])
@pytest.mark.parametrize("keep", [0, 1])
def test_deepest_is_the_papers_rule(model, kind, keep):
    asked = setting(model, kind, keep_last=keep)
    chosen = asked.space.plan(
        choose("deepest", asked, by_count(asked.space, 2)).skipped
    )
    expected = deepest(locate(model), kind, 2 / LAYERS, keep_last=bool(keep))
    assert (chosen.attention, chosen.mlp) == (expected.attention, expected.mlp)


@pytest.mark.parametrize("kind", ["attention", "mlp", "block"])
@pytest.mark.parametrize("amount", [{"count": 2}, {"fraction": 2 / LAYERS}])
def test_the_papers_rule_needs_no_weights(model, kind, amount):
    empty = build_empty(model.config)
    assert next(empty.parameters()).is_meta
    plan = deepest(locate(empty), kind, keep_last=True, **amount)
    space = Space(locate(model), kind, keep_last=1)
    chosen = choose(
        "deepest", setting(model, kind, keep_last=1), by_count(space, 2)
    ).skipped
    assert plan.indices == space.plan(chosen).indices
    assert plan.fingerprint == locate(model).fingerprint


def test_shallowest_and_random(model):
    asked = setting(model, "attention", keep_first=1)
    assert asked.space.plan(
        choose("shallowest", asked, by_count(asked.space, 2)).skipped
    ).attention == (1, 2)
    orders = {
        tuple(sorted(s, key=s.get))
        for seed in range(9)
        if (s := score_random(Setting(model, asked.space, [], None, seed)))
    }
    assert len(orders) > 1


@pytest.mark.parametrize("name", sorted(CRITERIA))
@pytest.mark.parametrize("kind", ["attention", "mlp", "block", "sublayer", "portable"])
def test_every_criterion_keeps_to_its_space(model, name, kind):
    portable = kind == "portable"
    asked = setting(
        model,
        "sublayer" if portable else kind,
        portable=portable,
        keep_first=1,
        keep_last=1,
    )
    if asked.space.kind not in CRITERIA[name].kinds:
        with pytest.raises(UsageError, match="only"):
            choose(name, asked, by_count(asked.space, 2))
        return
    skipped = choose(name, asked, by_count(asked.space, 2)).skipped
    assert len(skipped) == (4 if kind == "block" else 2)
    assert skipped <= set(asked.space.names)
    assert not any(part.endswith((".0", f".{LAYERS - 1}")) for part in skipped)
    if portable:
        assert is_portable(asked.space.structure, asked.space.plan(skipped))
    with skip(model, asked.space.plan(skipped)):
        assert model(BATCHES[0]).logits.isfinite().all()
    assert asked.space.allows(skipped)
    kept = "".join(name[0] for name in asked.space.order if name not in skipped)
    assert not portable or kept == "am" * (
        len(kept) // 2
    )  # attention, MLP, attention, MLP: an ordinary model


def test_a_limit_on_the_objective_is_kept(model):
    asked = setting(model)
    dense = asked.evaluator.cost(frozenset())
    for name in ("cosine", "greedy", "quadratic", "search"):
        skipped = choose(name, setting(model), by_limit(asked.space, 0.5)).skipped
        assert asked.evaluator.cost(skipped) - dense <= 0.5
        assert skipped
    assert frozenset(asked.space.plan(skipped).names) == skipped


@pytest.mark.parametrize("name", ["cosine", "first-order", "leave-one-out", "search"])
def test_what_choosing_took_is_told_by_the_clock_too(model, name, monkeypatch):
    """CPU seconds say little where a GPU does the work: here the CPU waits."""
    asked, record = setting(model, "attention"), replay.Replay._run
    slow = lambda *given: time.sleep(0.002) or record(*given)  # noqa: E731
    monkeypatch.setattr(replay.Replay, "_run", slow)
    began = time.monotonic()
    choose(name, asked, by_count(asked.space, 1))
    spent = asked.evaluator.spent
    assert spent.evaluations > 0
    assert 0 < spent.wall_seconds <= time.monotonic() - began
    if name in ("leave-one-out", "search"):
        assert spent.wall_seconds > spent.seconds
