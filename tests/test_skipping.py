"""Undo, nesting, removing for good: what `skip` and `remove` promise beside exact
logits.
"""

import copy

import pytest
import torch

from api import LayerCall, cutting, run_branches
from families import family, silenced
from notall import Plan, UsageError, locate, remove, skip

IDS = torch.arange(2 * 9).view(2, 9) % 90 + 3
PLAN = Plan(attention=[0, 2], mlp=[2, 3])


@pytest.fixture
def model():
    return family("gemma3").build()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def state(model):
    """All that undo must put back: config, modules and their attributes, by
    identity.
    """
    return (
        model.config.to_dict(),
        dict(model.config.__dict__),
        [
            (name, id(module), module.__dict__.get("layer_idx"))
            for name, module in model.named_modules()
        ],
        {name: id(weight) for name, weight in model.state_dict(keep_vars=True).items()},
    )


def test_skipping_changes_the_output_leaving_restores_it_entering_changes_it_again(
    model,
):
    before, dense = state(model), logits(model)
    with skip(model, PLAN):
        first = logits(model)
    assert torch.equal(logits(model), dense)
    assert state(model) == before
    with skip(model, PLAN):
        assert torch.equal(logits(model), first)
    assert (first - dense).abs().max() > 1e-2


def test_an_exception_inside_restores_the_model_too(model):
    before, dense = state(model), logits(model)
    with pytest.raises(RuntimeError, match="inside"), skip(model, PLAN):
        raise RuntimeError("inside")
    assert state(model) == before
    assert torch.equal(logits(model), dense)


def test_a_failure_while_entering_restores_the_model_too(model, monkeypatch):
    def fail(*_):
        raise RuntimeError("planted")

    before, dense = state(model), logits(model)
    monkeypatch.setattr(cutting, "are_cut", fail)  # it is asked last
    with pytest.raises(RuntimeError, match="planted"), skip(model, PLAN):
        pass
    assert state(model) == before
    assert torch.equal(logits(model), dense)


def test_the_empty_plan_changes_nothing(model):
    before, dense = state(model), logits(model)
    with skip(model, Plan()):
        assert state(model) == before
        assert torch.equal(logits(model), dense)


def test_nested_skips_leave_out_what_either_names(model):
    dense = logits(model)
    with skip(model, Plan(attention=[0, 2], mlp=[3])):
        both = logits(model)
    with skip(model, Plan(attention=[0])):
        outer = logits(model)
        with skip(model, Plan(attention=[2], mlp=[3])):
            assert torch.equal(logits(model), both)
        assert torch.equal(logits(model), outer)
        with (
            pytest.raises(UsageError, match="keep at least one"),
            skip(model, Plan(attention=[1, 2, 3])),
        ):
            pass
        assert torch.equal(logits(model), outer)
    assert torch.equal(logits(model), dense)


def test_the_config_counts_live_layers_and_slices_their_kinds(model):
    kinds = list(model.config.layer_types)
    with skip(model, PLAN):
        live = [i for i in range(len(kinds)) if i not in PLAN.attention]
        assert model.config.num_hidden_layers == len(live) == len(model.model.layers)
        assert list(model.config.layer_types) == [kinds[i] for i in live]
    assert list(model.config.layer_types) == kinds


def test_locate_inside_a_skip_still_tells_of_the_dense_model(model):
    structure = locate(model)
    with skip(model, PLAN):
        assert locate(model) is structure
    assert locate(model) is structure


def test_remove_equals_skip_and_frees_the_weights(model):
    with skip(model, PLAN):
        skipped = logits(model)
    parameters = sum(p.numel() for p in model.parameters())
    freed = sum(
        part.parameters
        for part in locate(model).sublayers
        if part.index in getattr(PLAN, part.kind)
    )
    remove(model, PLAN)
    assert torch.equal(logits(model), skipped)
    assert sum(p.numel() for p in model.parameters()) == parameters - freed


def test_what_cannot_be_saved_as_this_architecture_is_not_saved(model, tmp_path):
    remove(model, PLAN)
    with pytest.raises(UsageError, match="original checkpoint"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "plan", [PLAN, Plan(attention=[2], mlp=[1])], ids=["any", "portable"]
)
def test_a_skipped_model_is_not_saved_under_names_that_a_load_does_not_know(
    model, plan, tmp_path
):
    with skip(model, plan), pytest.raises(UsageError, match=r"notall\.export"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)  # outside, it is its own again
    assert torch.equal(
        logits(type(model).from_pretrained(tmp_path, attn_implementation="eager")),
        logits(model),
    )


def test_a_model_without_whole_blocks_is_saved_as_it_runs(tmp_path):
    model, plan = family("llama").build(), Plan([1], [1])
    with skip(model, plan):
        skipped = logits(model)
        model.save_pretrained(tmp_path)
    assert torch.equal(
        logits(type(model).from_pretrained(tmp_path, attn_implementation="eager")),
        skipped,
    )


def test_a_portable_plan_leaves_an_ordinary_model(tmp_path):
    model = family("llama").build()
    plan = Plan(
        attention=[2], mlp=[1, 3]
    )  # A0 M0 A1 . . M2 A3 . : the last attention loses its MLP: not portable
    other = Plan(attention=[2], mlp=[1])  # A0 M0 A1 . . M2 A3 M3
    with skip(model, other):
        skipped = logits(model)
    not_portable = copy.deepcopy(model)
    remove(model, other)
    assert torch.equal(logits(model), skipped)
    assert {type(layer).__name__ for layer in model.model.layers} == {
        "LlamaDecoderLayer"
    }
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert again.config.num_hidden_layers == 3
    assert torch.equal(logits(again), skipped)
    remove(not_portable, plan)
    with pytest.raises(UsageError):
        not_portable.save_pretrained(tmp_path)


def test_remove_inside_a_skip_is_refused(model):
    with skip(model, PLAN), pytest.raises(UsageError, match="leave it"):
        remove(model, Plan([1]))


def test_a_static_cache_that_generate_kept_is_not_used_for_another_plan(model):
    def generated():
        out = model.generate(
            IDS, max_new_tokens=4, do_sample=False, cache_implementation="static",
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        assert len(out.past_key_values.layers) == len(model.model.layers)
        return torch.stack(out.logits)

    dense = generated()
    with skip(model, PLAN):
        skipped = generated()
    assert torch.equal(generated(), dense)
    with silenced(model, family("gemma3"), PLAN.attention, PLAN.mlp):
        torch.testing.assert_close(
            skipped[0], model(IDS).logits[:, -1], rtol=1e-5, atol=1e-4
        )


def test_hidden_states_first_asked_for_inside_a_skip_are_there_outside(model):
    layers = len(model.model.layers)
    with skip(model, PLAN):
        assert (
            len(model(IDS, output_hidden_states=True).hidden_states)
            == layers - len(PLAN.attention) + 1
        )
    assert len(model(IDS, output_hidden_states=True).hidden_states) == layers + 1
    with skip(model, PLAN):
        assert (
            len(model(IDS, output_hidden_states=True).hidden_states)
            == layers - len(PLAN.attention) + 1
        )
        assert (logits(model) - model(IDS).logits).abs().max() == 0


@torch.no_grad()
def test_dropout_that_a_layer_applies_itself_follows_its_mode():
    """OPT's layers drop out what their sublayers answer with a function, which is seen
    in evaluation mode.
    """
    model = family("opt").build(dropout=0.5)
    structure = locate(model)
    layer, mlp = model.get_submodule(structure.layers)[1], structure.blocks[1].mlp
    hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))

    def ran_twice():
        return [
            run_branches(mlp.branches, layer, hidden, LayerCall({})) for _ in range(2)
        ]

    assert torch.equal(*ran_twice())
    layer.train()
    assert not torch.equal(*ran_twice())


def test_locating_puts_each_module_back_into_its_mode(model):
    model.train()
    model.model.layers[1].mlp.eval()
    before = {name: module.training for name, module in model.named_modules()}
    locate(model)
    assert {name: module.training for name, module in model.named_modules()} == before
