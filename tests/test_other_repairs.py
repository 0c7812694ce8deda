"""Repairs of other papers as a stranger adds them: each matrix against its formula, on
a tiny model.
"""

from copy import deepcopy

import pytest
import torch

from api import DenseStream, Projections, Repair, kept_repair, nbl
from families import family
from notall import Plan, repair
from programs import ROOT, program

others = program("benchmarks/repairing/others")

BATCHES = list((torch.arange(12 * 40).view(12, 40) * 7 % 89 + 3).split(4))
GAPS = Plan([1, 2], [1])  # one of three sublayers


@pytest.fixture(scope="module")
def model():
    return family("llama").build("sdpa", num_hidden_layers=5, hidden_size=48).double()


def stream(model):
    """Before the second layer, and before the third one's MLP, of the original model:
    (tokens, hidden).
    """
    seen = {"before": [], "behind": []}
    first, last = (
        model.model.layers[1].input_layernorm,
        model.model.layers[2].post_attention_layernorm,
    )
    handles = [
        first.register_forward_pre_hook(
            lambda _, args: seen["before"].append(args[0].flatten(0, 1))
        ),
        last.register_forward_pre_hook(
            lambda _, args: seen["behind"].append(args[0].flatten(0, 1))
        ),
    ]
    with torch.no_grad():
        for batch in BATCHES:
            model(batch)
    for handle in handles:
        handle.remove()
    return torch.cat(seen["before"]), torch.cat(seen["behind"])


def only_map(repaired):
    ((name, found),) = repaired.maps.items()
    assert name == "attn.1"
    return found


@pytest.mark.parametrize("size", [1, 2, 12, 44, 64, 576, 640, 1536, 2048])
def test_hadamard_matrices_are_orthogonal_and_flat(size):
    found = others.hadamard(size)
    torch.testing.assert_close(found @ found.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(found.abs(), torch.full_like(found, size**-0.5))


def test_of_other_sizes_none_is_known():
    with pytest.raises(ValueError, match="no Hadamard matrix of size 18"):
        others.hadamard(18)


def test_linear_patch_gives_each_turned_channel_its_magnitude(model):
    before, behind = stream(model)
    matrix = only_map(others.linear_patch(model, GAPS, BATCHES)).matrix + torch.eye(48)
    torch.testing.assert_close(matrix, matrix.T)
    turn = others.hadamard(48)
    torch.testing.assert_close(
        (before @ matrix.T @ turn).abs().mean(0), (behind @ turn).abs().mean(0)
    )
    inside = turn.T @ matrix @ turn
    torch.testing.assert_close(inside, torch.diag(inside.diagonal()))


def test_the_rotation_is_the_nearest_one(model):
    linalg = pytest.importorskip("scipy.linalg")
    before, behind = stream(model)
    matrix = only_map(others.rotation(model, GAPS, BATCHES)).matrix + torch.eye(48)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(48, dtype=torch.float64))
    expected, _ = linalg.orthogonal_procrustes(before.numpy(), behind.numpy())
    torch.testing.assert_close(
        matrix.T, torch.from_numpy(expected), rtol=1e-5, atol=1e-6
    )


def test_streamline_is_the_least_squares_layer_over_the_gap(model):
    before, behind = stream(model)
    found = only_map(others.streamline(model, GAPS, BATCHES))
    biased = torch.cat([before, torch.ones(len(before), 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(biased, behind - before).solution
    torch.testing.assert_close(
        torch.cat([found.matrix.T, found.bias[None]]), expected, rtol=1e-5, atol=1e-6
    )


def test_over_one_block_streamline_and_nbl_are_the_same(model):
    ours, theirs = (
        others.streamline(model, Plan([2], [2]), BATCHES),
        nbl(model, Plan([2], [2]), BATCHES),
    )
    for one, other in zip(ours.maps["attn.2"].tensors, theirs.maps["attn.2"].tensors):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["linear_patch", "rotation", "streamline"])
def test_each_is_named_as_a_stranger_names_it(model, name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/repairing"))
    repaired, seconds = kept_repair(tmp_path, f"others:{name}", model, GAPS, BATCHES)
    assert seconds > 0
    again = only_map(getattr(others, name)(model, GAPS, BATCHES))
    for kept, made in zip(only_map(repaired).tensors, again.tensors):
        torch.testing.assert_close(kept, made, rtol=1e-5, atol=1e-6)


def test_turns_of_one_layer_are_a_repair(model):
    for plan in (Plan([2], [2]), Plan([], [3])):
        once, found = repair(model, plan, BATCHES), others.turns(model, plan, BATCHES)
        assert once.weights.keys() == found.weights.keys() != set()
        for path, weight in once.weights.items():
            assert torch.equal(weight, found.weights[path])


@torch.no_grad()
def test_a_turn_begins_with_the_weights_of_the_one_before_and_aims_at_the_original(
    model,
):
    """By a model of its own with those weights, and the original's stream."""
    plan, weights = Plan([1, 3], [2]), {}
    for last in (Plan([3]), Plan([3], [2]), plan):
        changed = deepcopy(model)
        changed.load_state_dict(weights, strict=False)
        text = DenseStream(model, BATCHES, keep_all=True)
        text.before(len(text.lines))
        text.model, text.layers = changed, changed.model.layers
        text.projections = Projections(changed, BATCHES[0])
        weights |= {
            path: weight.clone()
            for path, weight in Repair(text, last).run().weights.items()
        }
    for gone in ("1.self_attn", "3.self_attn", "2.mlp"):
        weights = {
            path: weight
            for path, weight in weights.items()
            if f"layers.{gone}." not in path
        }
    found = others.turns(model, plan, BATCHES).weights
    assert found.keys() == weights.keys()
    for path, weight in found.items():
        torch.testing.assert_close(weight, weights[path])
    assert any(
        not torch.equal(one, found[path])
        for path, one in repair(model, plan, BATCHES).weights.items()
    )
