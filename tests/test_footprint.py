"""What is counted as saved is what is really gone."""

import pytest
import torch

from api import footprint
from families import FAMILIES, family
from notall import Plan, locate, remove, skip


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "cohere", "gemma3", "mixtral"])
@pytest.mark.parametrize(
    "plan",
    [Plan(attention=[1]), Plan(mlp=[0, 3]), Plan([2], [2]), Plan([0, 1], [1, 2])],
    ids=str,
)
def test_counts_equal_what_is_left_after_removing(name, plan):
    model = family(name).build()
    expected = footprint(model, plan)
    with skip(model, plan), torch.no_grad():
        answer = model(torch.arange(3, 13)[None], use_cache=True)
    cache = answer.cache if "cache" in answer else answer.past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert expected.kv_bytes_per_token * 10 >= held  # windows hold less
    if getattr(model.config, "sliding_window", None) is None:
        assert expected.kv_bytes_per_token * 10 == held
    remove(model, plan)
    left = {id(p): p for p in model.parameters()}.values()
    assert expected.params == sum(p.numel() for p in left)
    assert expected.weight_bytes == sum(p.nbytes for p in left)


@pytest.mark.parametrize("name", ["llama", "cohere", "falcon (one norm)", "phi"])
def test_each_weight_of_a_layer_is_counted_with_one_sublayer(name):
    """Also a norm that both sublayers of a parallel block read."""
    model = family(name).build()
    structure = locate(model)
    for block, layer in zip(structure.blocks, model.get_submodule(structure.layers)):
        assert sum(part.parameters for part in block.sublayers) == sum(
            p.numel() for p in layer.parameters()
        )
        assert sum(part.weight_bytes for part in block.sublayers) == sum(
            p.nbytes for p in layer.parameters()
        )


def test_families_are_many():
    assert len([f for f in FAMILIES if f.exists]) > 30
