"""What layers and sublayers do to the stream, beside hooks on modules named by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from api import (
    CRITERIA,
    Evaluator,
    Passage,
    Setting,
    Space,
    by_count,
    choose,
    measure_similarity,
    nll,
    score_first_order,
    times,
    walk,
)
from families import TRANSFORMERS_5, Family, family, modules_of, silenced, stack_of
from notall import locate, skip
from test_in_place import KINDS

pytestmark = [pytest.mark.slow, pytest.mark.each_release]

IDS = torch.arange(24).view(2, 12) * 7 % 90 + 3
since_5 = pytest.mark.skipif(
    not TRANSFORMERS_5, reason="transformers 4.57 keeps a place for every layer"
)


def walked(model: PreTrainedModel, ids: Tensor) -> list[Passage]:
    passages: list[Passage] = []
    walk(model, passages.append, input_ids=ids)
    return passages


@pytest.mark.parametrize(
    "name", ["llama", "gpt_neox"]
)  # one after the other, and parallel
def test_every_state_of_the_dense_model_is_passed(name: str) -> None:
    model = family(name).build()
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
        passages = walked(model, IDS)
        final = states[-1]
    for passage, before in zip(passages, states):
        torch.testing.assert_close(passage.before, before, rtol=1e-5, atol=1e-5)
    for passage in passages:
        (start, middle), (second, end) = (
            passage.around["attention"],
            passage.around["mlp"],
        )
        assert torch.equal(start, passage.before)
        if not passage.block.parallel:
            assert torch.equal(second, middle)
            assert torch.equal(end, passage.after)
    # transformers gives the last state after the final norm; ours is before it.
    assert not torch.allclose(passages[-1].after, final)


# --- layers that stay in place, or stay or go as wholes
# --------------------------------------------------------------------------------------


def one_stream(state: Tensor) -> Tensor:
    """Side by side: DeepSeek V4's streams come after the tokens, Gemma 3n's before the
    sequences.
    """
    if state.dim() == 3:
        return state
    streams = state.unbind(2) if state.shape[:2] == IDS.shape else state.unbind(0)
    return torch.cat(streams, dim=-1)


@torch.no_grad()
def passed(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    """What each layer is given and what it answers."""
    found: list[tuple[Tensor, Tensor]] = []

    def note(layer: Any, args: Any, kwargs: Any, answer: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        found.append(
            (
                one_stream(given),
                one_stream(answer[0] if isinstance(answer, tuple) else answer),
            )
        )

    handles = [
        layer.register_forward_hook(note, with_kwargs=True) for layer in stack_of(model)
    ]
    model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@since_5
@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_layers_in_place_are_passed_as_the_dense_model_passes_them(name: str) -> None:
    model = family(name).build()
    expected = model(input_ids=IDS, use_cache=False).logits
    locate(model)
    heads: list[int] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda *_: heads.append(1))
    for passage, (before, after) in zip(walked(model, IDS), passed(model), strict=True):
        assert torch.equal(passage.before, before)
        torch.testing.assert_close(passage.after, after, rtol=1e-5, atol=1e-6)
    assert len(heads) == 1  # of `passed`
    assert torch.equal(model(input_ids=IDS, use_cache=False).logits, expected)


@since_5
@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["gemma4_text", "gemma3n_text", "glm_moe_dsa", "deepseek_v4", "doge", "zamba2"],
)
def test_around_a_sublayer_is_what_its_layer_answers_without_it_and_with_it(
    name: str,
) -> None:
    one = family(name)
    model = one.build()
    for passage in walked(model, IDS):
        index = passage.block.index
        if index in one.whole:
            start, end = passage.around["attention"]
            assert torch.equal(start, passage.before)
            assert torch.equal(end, passage.after)
            continue
        kinds = passage.block.kinds
        without = [((index,), (index,)[: len(kinds) - 1]), ((), (index,)), ((), ())][
            : 1 + len(kinds)
        ]
        answers = []
        for attention, mlp in without if len(kinds) == 2 else [without[0], ((), ())]:
            with silenced(model, one, attention, mlp):
                answers.append(passed(model)[index][1])
        for kind, before, after in zip(kinds, answers, answers[1:]):
            torch.testing.assert_close(
                passage.around[kind][0], before, rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                passage.around[kind][1], after, rtol=1e-4, atol=1e-5
            )
            assert not torch.allclose(before, after, rtol=1e-3, atol=1e-4)


@contextmanager
def scaled(
    model: PreTrainedModel, one: Family, name: str, gate: Tensor
) -> Iterator[None]:
    """What the sublayer `name` adds, times `gate`: hooks on modules named by hand."""
    short, _, index = name.partition(".")
    layer = stack_of(model)[int(index)]

    def scale(module: Any, args: Any, kwargs: Any, answer: Any) -> Any:
        given = (args[0] if args else kwargs["hidden_states"]) if module is layer else 0
        value = answer[0] if isinstance(answer, tuple | list) else answer
        value = given + gate * (value - given)
        return (value, *answer[1:]) if isinstance(answer, tuple | list) else value

    whole, names = (
        int(index) in one.whole,
        (one.attention if short == "attn" else one.mlp),
    )
    modules = [layer] if whole else [module for _, module in modules_of(layer, names)]
    handles = [
        module.register_forward_hook(scale, with_kwargs=True) for module in modules
    ]
    yield
    for handle in handles:
        handle.remove()


def setting(model: PreTrainedModel) -> Setting:
    return Setting(model, Space(locate(model)), [IDS], Evaluator(model, nll([IDS])))


@since_5
@pytest.mark.parametrize(
    "name", ["gemma4_text", "gemma3n_text", "deepseek_v4", "doge", "bert"]
)
def test_gradients_in_place_are_those_of_a_gate_on_what_is_named_by_hand(
    name: str,
) -> None:
    """No finite differences: DeepSeek V4 routes its tokens, and jumps."""
    one = family(name)
    model = one.build()
    scores = score_first_order(setting(model))
    for part in locate(model).sublayers:
        gate = torch.ones((), requires_grad=True)
        with scaled(model, one, part.name, gate):
            logits = model(input_ids=IDS, use_cache=False).logits[:, :-1].float()
        loss = cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
        (slope,) = torch.autograd.grad(loss, gate)
        assert scores[part.name,] == pytest.approx(-float(slope), rel=1e-3, abs=1e-6), (
            part.name
        )


@pytest.mark.parametrize(
    "shape", [(2, 5, 4), (2, 5, 3, 4), (3, 2, 5, 4), (10, 4)], ids=str
)
def test_a_gate_is_that_of_its_sequence_wherever_streams_stand(
    shape: tuple[int, ...],
) -> None:
    scaled_ones = times(torch.tensor([1.0, 3.0]), (2, 5))(torch.ones(shape))
    by_sequence = (
        scaled_ones.movedim(1, 0) if shape == (3, 2, 5, 4) else scaled_ones.view(2, -1)
    )
    assert torch.equal(by_sequence[0], torch.full_like(by_sequence[0], 1.0))
    assert torch.equal(by_sequence[1], torch.full_like(by_sequence[1], 3.0))


@since_5
@pytest.mark.parametrize(
    "name", [name for name, one in CRITERIA.items() if "attention" in one.kinds]
)
def test_every_criterion_chooses_among_layers_in_place(name: str) -> None:
    model = family("gemma4_text").build()
    if not CRITERIA[name].fits(model):
        pytest.skip("asks for other layers")
    asked = setting(model)
    chosen = asked.space.plan(choose(name, asked, by_count(asked.space, 2)).skipped)
    assert len(chosen.names) == 2
    with skip(model, chosen), torch.no_grad():
        model(input_ids=IDS)


@since_5
def test_similarity_in_place_is_the_papers() -> None:
    model = family("gemma4_text").build()
    found = {
        (one.layer, one.kind): one.cosine for one in measure_similarity(model, [IDS])
    }
    for index, (before, after) in enumerate(passed(model)):
        by_hand = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        assert found[index, "block"] == pytest.approx(float(by_hand.mean()), abs=1e-5)
    assert len(found) == 3 * len(passed(model))
