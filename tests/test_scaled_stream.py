"""Layers that multiply their stream by a number of their own, as Gemma 4's do: whatever
runs them apart does so too.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from api import METHODS, Layerwise, Passage, Replay, UsageError, gated, record, walk
from families import TRANSFORMERS_5, family, replayed_logits, silenced, stack_of
from notall import Plan, locate, remove, skip

pytestmark = pytest.mark.skipif(
    not TRANSFORMERS_5, reason="Gemma 4 is of transformers 5"
)

GEMMA = "gemma4_text (nothing shared)"
TOKENS = torch.randint(3, 99, (2, 11), generator=torch.Generator().manual_seed(0))
PLANS = [
    Plan(),
    Plan([0], [0]),
    Plan([1], []),
    Plan([], [1]),
    Plan([2], [1]),
    Plan([0, 2], []),  # an MLP ahead of every attention
    Plan([3], [3]),  # what is last is left out
    Plan([1, 2], [2, 3]),
]


@pytest.fixture
def model():
    return family(GEMMA).build()


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


def silent(model, plan: Plan) -> Tensor:
    with torch.no_grad(), silenced(model, family(GEMMA), plan.attention, plan.mlp):
        return model(TOKENS, use_cache=False).logits


def test_it_is_read_line_by_line(model) -> None:
    structure = locate(model)
    assert not structure.in_place
    numbers = [float(layer.layer_scalar) for layer in stack_of(model)]
    assert [block.scale for block in structure.blocks] == numbers
    assert min(abs(number - 1) for number in numbers) > 0.01  # so that each matters


@torch.no_grad()
def test_replayed_together_plans_answer_as_hooks_do(model) -> None:
    for number, logits in replayed_logits(Replay(model, PLANS), input_ids=TOKENS):
        assert close(logits, silent(model, PLANS[number])), PLANS[number]


@torch.no_grad()
def test_a_replay_ends_in_what_the_last_layer_answers(model) -> None:
    """The norm behind it would not tell."""
    seen: list[Tensor] = []
    plan = Plan([3], [3])
    with silenced(model, family(GEMMA), plan.attention, plan.mlp):
        stack_of(model)[-1].register_forward_hook(lambda *told: seen.append(told[2]))
        model(TOKENS, use_cache=False)
    ((_, found),) = Replay(model, [plan]).hidden_states(record(model, input_ids=TOKENS))
    assert close(found, seen[0])


@pytest.mark.parametrize("plan", PLANS[1:], ids=str)
@torch.no_grad()
def test_removed_for_good_it_answers_so_in_any_dtype(model, plan: Plan) -> None:
    expected = silent(model, plan)
    with skip(model, plan):
        assert close(model(TOKENS).logits, expected)
    remove(model, plan)
    assert close(model.double()(TOKENS).logits, expected.double())
    assert (
        model.bfloat16()(TOKENS).logits.dtype == torch.bfloat16
    )  # the numbers go along


@torch.no_grad()
def test_numbers_of_a_finer_dtype_leave_the_stream_in_its_own(model) -> None:
    model.bfloat16()
    for layer in stack_of(model):
        layer.layer_scalar.data = layer.layer_scalar.float()
    with skip(model, Plan([1])):
        assert model(TOKENS).logits.dtype == torch.bfloat16


@torch.no_grad()
def test_passages_lead_from_layer_to_layer(model) -> None:
    seen: list[Passage] = []
    walk(model, seen.append, input_ids=TOKENS)
    given = model(TOKENS, output_hidden_states=True, use_cache=False).hidden_states
    for passage, before, after in zip(seen[:-1], given, given[1:]):
        assert close(passage.before, before)
        assert close(passage.after, after)
    assert len(seen) == 4


def test_gates_that_are_open_change_nothing(model) -> None:
    structure = locate(model)
    gates = {part.name: torch.ones(len(TOKENS)) for part in structure.sublayers}
    with gated(model, structure, gates, TOKENS.shape):
        found = model(TOKENS, use_cache=False).logits
    assert close(found, silent(model, Plan()))


@torch.no_grad()
def test_the_stream_of_a_healing_is_off_only_where_something_is_skipped(model) -> None:
    structure, off = locate(model), []
    for plan in (Plan(), Plan([1])):
        stream = Layerwise(model, structure, plan, stack_of(model))
        off.append(float(stream.loss(*stream.targets(TOKENS))))
    assert off[0] < 1e-10 < 1e-4 < off[1]


def test_published_repairs_leave_it_alone(model) -> None:
    for name in ("replaceme", "prune-and-comp", "nbl", "ghosted"):
        with pytest.raises(
            UsageError, match=r"multiply their stream; only notall\.repair knows"
        ):
            METHODS[name].repair(model, Plan([1]), [TOKENS])
