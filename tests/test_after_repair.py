"""What a set of skipped sublayers costs after a cheap repair, against the repair and
whole forwards.
"""

from __future__ import annotations

import pytest
import torch

from api import (
    ONE_IN,
    AfterRepair,
    DenseStream,
    Repair,
    after_repair_RIDGES as RIDGES,
    evaluator as evaluators,
    space_plan_of as plan_of,
)
from families import family
from notall import UsageError, skip

pytestmark = (
    pytest.mark.any_transformers
)  # of how much of a repair is run again; the repair is tested on both

SETS = [frozenset({"attn.1"}), frozenset({"attn.0", "mlp.2"})]
NESTED = (
    "attn.1",
    "attn.1 mlp.6",
    "attn.1 mlp.6 attn.8",
    "attn.1 attn.6 attn.8",
    "attn.1 attn.8",
    "attn.1 mlp.11",
)


def texts(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 99, shape, generator=generator) for shape in shapes]


@torch.no_grad()
def slow(model, skipped, rows):
    """Repaired with every other sequence, judged by logits of whole forwards on the
    rest.
    """
    plan = plan_of(skipped)
    repaired = Repair(
        DenseStream(model, rows, one_in=ONE_IN), plan, ridges=RIDGES, near=True
    ).run()
    losses = []
    for ids in rows[1::2]:
        log_p = model(ids).logits[:, :-1].log_softmax(-1)
        with skip(model, repaired):
            log_q = model(ids).logits[:, :-1].log_softmax(-1)
        losses.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("share", "count"), [(1.0, 8), (0.25, 2)])
def test_a_cost_is_what_the_repair_and_whole_forwards_give(share, count):
    model, batches = family("llama").build(), texts((4, 12), (4, 12))
    evaluator = AfterRepair(model, batches)
    rows = [row for batch in batches for row in batch.split(1)][:count]
    expected = [slow(model, skipped, rows) for skipped in SETS]
    assert evaluator.costs(SETS, share) == pytest.approx(expected, rel=1e-4)
    assert evaluator.cost(frozenset(), share) == 0


def test_what_was_evaluated_is_answered_from_the_folder(tmp_path, monkeypatch):
    model, batches = family("llama").build(), texts((4, 12))
    known = AfterRepair(model, batches, folder=tmp_path).costs(SETS)
    monkeypatch.setattr(evaluators, "Refitting", None)
    assert AfterRepair(model, batches, folder=tmp_path).costs(SETS) == known


def test_fewer_than_four_sequences_are_refused():
    with pytest.raises(UsageError, match="four sequences or more"):
        AfterRepair(family("llama").build(), texts((3, 12)))


@pytest.mark.skipif(
    not family("gemma4_text").exists, reason="this transformers has no Gemma 4"
)
def test_layers_that_cannot_be_looked_into_are_refused():
    with pytest.raises(
        UsageError,
        match="a repair runs sublayers one at a time; gemma4_text's run only in layers",
    ):
        AfterRepair(family("gemma4_text").build(), texts((4, 12)))


@pytest.mark.slow
def test_a_repair_goes_on_from_where_it_parts_from_another():
    model, batches = family("llama").build(num_hidden_layers=12), texts((8, 12))
    together, sets = (
        AfterRepair(model, batches),
        [frozenset(names.split()) for names in NESTED],
    )
    for skipped in sets:
        alone = AfterRepair(model, batches)
        assert together.cost(skipped) == alone.cost(skipped)
        together.set_prefix(skipped)
    each = [AfterRepair(model, batches) for _ in sets]
    assert [one.cost(skipped) for one, skipped in zip(each, sets)] == together.costs(
        sets
    )
    apart = sum(one.spent.executions for one in each)
    assert together.spent.executions < 0.7 * apart
    alone = AfterRepair(model, batches, states_bytes=0)
    assert alone.costs(sets) == together.costs(sets)
    assert alone.spent.executions == apart


def test_the_base_is_kept_however_much_is_asked_for():
    model, batches = family("llama").build(num_hidden_layers=12), texts((8, 12))
    evaluator = AfterRepair(model, batches)
    base = frozenset({"attn.1"})
    evaluator.cost(base)
    evaluator.set_prefix(base)
    for place in range(3, 9):
        evaluator.cost(frozenset({f"attn.{place}"}))
    before = evaluator.spent.executions
    evaluator.cost(base | {"mlp.11"})
    assert evaluator.spent.executions - before < 8


@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize(
    "other", ["attn.1 mlp.9", "attn.1 mlp.2", "attn.1 mlp.3", "attn.1 attn.3", "attn.1"]
)
@torch.no_grad()
def test_what_a_repair_makes_does_not_depend_on_what_it_goes_on_from(near, other):
    text = DenseStream(
        family("llama").build(num_hidden_layers=12),
        texts((8, 12)),
        one_in=ONE_IN,
        keep_all=True,
    )
    first, alone, going_on = (
        Repair(text, plan_of(frozenset(names.split())), near=near, keep_all=True)
        for names in ("attn.1 mlp.9", other, other)
    )
    first.run()
    expected, found = alone.run(), going_on.run(others=[first])
    assert [one.names for one in going_on.steps] == [one.names for one in alone.steps]
    assert found.weights.keys() == expected.weights.keys()
    assert all(
        torch.equal(found.weights[path], weight)
        for path, weight in expected.weights.items()
    )
    assert [(one.sublayers, one.ridge, one.left) for one in found.refits] == [
        (one.sublayers, one.ridge, one.left) for one in expected.refits
    ]
    assert going_on.ran < alone.ran or going_on.shared_with(first) < 2
