"""What a set of skipped sublayers costs after a cheap repair, against the repair and whole forwards."""

from __future__ import annotations

import pytest
import torch

from families import family
from notall import UsageError, skip
from notall.choosing import after_repair
from notall.choosing.after_repair import ONE_IN, RIDGES, AfterRepair
from notall.choosing.space import plan_of
from notall.repairing.refitting import Calibration, Repair

SETS = [frozenset({"attn.1"}), frozenset({"attn.0", "mlp.2"})]


def texts(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 99, shape, generator=generator) for shape in shapes]


@torch.no_grad()
def slow(model, skipped, rows):
    """Repaired with every other sequence, judged by logits of whole forwards on the rest."""
    plan = plan_of(skipped)
    repaired = Repair(Calibration(model, rows, one_in=ONE_IN), plan, ridges=RIDGES, near=True).run()
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
    monkeypatch.setattr(after_repair, "Repair", None)
    assert AfterRepair(model, batches, folder=tmp_path).costs(SETS) == known


def test_fewer_than_four_sequences_are_refused():
    with pytest.raises(UsageError, match="four sequences or more"):
        AfterRepair(family("llama").build(), texts((3, 12)))
