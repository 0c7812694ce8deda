"""Shared prefixes give what one plan at a time gives, at the cost of what differs."""

import pytest
import torch

from api import Replay
from families import each_block, family, replayed_logits, representatives
from notall import Plan, UnsupportedModel, deepest, locate, skip

IDS = torch.arange(2 * 9).view(2, 9) % 90 + 3
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0


def plans_for(structure):
    grid = [
        deepest(structure, kind, fraction, keep_last=keep)
        for kind in ("attention", "mlp", "block")
        for fraction in (0.25, 0.5)
        for keep in (False, True)
    ]
    return [
        Plan(),
        *grid,
        Plan(attention=[0], mlp=[0, 2]),
        Plan(attention=[1, 2]),
        Plan(mlp=[0, 1, 2, 3]),
    ]


@each_block(representatives(), "tested")
@torch.no_grad()
def test_replay_equals_one_by_one(tested):
    model = tested.build()
    try:
        plans = plans_for(locate(model))
    except UnsupportedModel as refusal:
        pytest.skip(str(refusal))
    found = dict(
        replayed_logits(Replay(model, plans), input_ids=IDS, attention_mask=MASK)
    )
    assert len(found) == len(plans)
    for number, plan in enumerate(plans):
        with skip(model, plan):
            expected = model(input_ids=IDS, attention_mask=MASK).logits
        scale = expected.abs().max()
        assert (found[number] - expected)[MASK.bool()].abs().max() <= 1e-6 * scale, plan


def test_bit_identical_where_sublayers_run_in_the_models_own_order():
    model = family("llama").build()
    plans = plans_for(locate(model))
    with torch.no_grad():
        for number, logits in replayed_logits(Replay(model, plans), input_ids=IDS):
            with skip(model, plans[number]):
                assert torch.equal(logits, model(input_ids=IDS).logits)


def test_each_distinct_prefix_runs_once():
    model = family("llama").build()
    plans = [Plan(), Plan(attention=[3]), Plan(mlp=[3]), Plan(attention=[3], mlp=[3])]
    replay = Replay(model, plans)
    runs = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: runs.append("attention"))
        layer.mlp.register_forward_hook(lambda *_: runs.append("mlp"))
    with torch.no_grad():
        assert len(list(replayed_logits(replay, input_ids=IDS))) == 4
    # 6 shared, then A3 and M3 behind it, and M3 behind M2.
    assert replay.executions == len(runs) == 6 + 3


def test_equal_plans_are_answered_once_each():
    model = family("llama").build()
    with torch.no_grad():
        found = dict(
            replayed_logits(
                Replay(model, [Plan([1]), Plan(), Plan([1])]), input_ids=IDS
            )
        )
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_the_dense_model_is_answered_first_also_where_a_plan_ends_on_its_way():
    model = family("llama").build()
    with torch.no_grad():
        order = [
            n
            for n, _ in replayed_logits(
                Replay(model, [Plan(), Plan([0]), Plan(mlp=[3])]), input_ids=IDS
            )
        ]
    assert order[0] == 0
