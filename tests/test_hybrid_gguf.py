"""GGUF files of hybrids and of Gemma 4: cut, they answer as the dense file whose
skipped sublayers add nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import engines
from api import cut, export, llamacpp, read_gguf
from notall import Plan, UsageError
from tiny_hybrid_gguf import DEPTH, LAYERS, write_hybrid

# of files for llama.cpp: no model of transformers is behind them
pytestmark = [pytest.mark.slow, pytest.mark.any_transformers]

TOKENS = [5, 30, 31, 32, 90, 41, 7]
PERIOD, OTHERS = (
    Plan([4, 5, 6, 7], [4, 5, 6, 7]),
    Plan([1, 6], [1, 6]),
)  # of three linear attentions and a full one
PLANS = {
    "qwen35": {"a period": PERIOD, "others": OTHERS, "portable": Plan([2], [1])},
    "lfm2": {"whole layers": Plan([0, 2], [0, 2]), "portable": Plan([5], [4])},
    "granitehybrid": {"whole layers": Plan([0, 2], [0, 2]), "portable": Plan([4], [3])},
    "gemma4": {
        "whole layers": Plan([1, 4], [1, 4]),
        "the first": Plan([0], [0]),
        "portable": Plan([0, 3], [0, 2]),
    },
    "nemotron_h": {"whole layers": Plan([2, 3], [1]), "the first": Plan([0], [])},
}
CASES = [
    pytest.param(architecture, name, id=f"{architecture}-{name}")
    for architecture, plans in PLANS.items()
    for name in plans
]


def names_in(plan: Plan) -> frozenset[str]:
    return frozenset(
        [f"attn.{index}" for index in plan.attention]
        + [f"mlp.{index}" for index in plan.mlp]
    )


@engines.needs("xllamacpp", "pip install xllamacpp")
@pytest.mark.parametrize(("architecture", "name"), CASES)
def test_llamacpp_answers_as_the_dense_file_whose_skipped_sublayers_are_silent(
    architecture, name, tmp_path
):
    plan = PLANS[architecture][name]
    dense = write_hybrid(architecture, tmp_path / "dense.gguf")
    silent = write_hybrid(architecture, tmp_path / "silent.gguf", silent=names_in(plan))
    out = export(dense, plan, "gguf", tmp_path / "out", verify=False)
    (found,) = llamacpp.next_token_logprobs(next(out.glob("*.gguf")), TOKENS)
    (expected,), (unskipped,) = (
        llamacpp.next_token_logprobs(file, TOKENS) for file in (silent, dense)
    )
    both = found.keys() & expected.keys()
    assert len(both) >= llamacpp.LIKELIEST - 1  # of two that are as likely one may miss
    assert max(abs(found[token] - expected[token]) for token in both) < 2e-3
    assert found != unskipped
    engines.works(
        "llama.cpp",
        "xllamacpp",
        "gguf",
        architecture,
        "portable" if name == "portable" else "whole layers",
    )


@pytest.mark.parametrize("architecture", LAYERS)
def test_kept_blocks_are_the_dense_ones(architecture, tmp_path: Path):
    source = read_gguf(write_hybrid(architecture, tmp_path / "dense.gguf"))
    plan = next(iter(PLANS[architecture].values()))
    fields, tensors = cut(source, plan)
    gone = {
        index for index in range(DEPTH) if index in plan.attention or index in plan.mlp
    }
    kept = [index for index in range(DEPTH) if index not in gone]
    for number, index in enumerate(kept):
        for name, tensor in source.block(index).items():
            if name == "layer_output_scale.weight":
                continue
            assert tensors[f"blk.{number}.{name}"] is tensor
    assert fields[f"{architecture}.block_count"].value == len(kept)
    counts = source.setting("attention.head_count_kv")
    if isinstance(counts, list):
        assert fields[f"{architecture}.attention.head_count_kv"].value == [
            counts[index] for index in kept
        ]


def test_layers_in_another_order_than_their_period_are_listed(tmp_path):
    source = read_gguf(write_hybrid("qwen35", tmp_path / "dense.gguf"))
    listed = "qwen35.attention.recurrent_layers"
    assert listed not in cut(source, PERIOD)[0]
    fields = cut(source, OTHERS)[0]
    assert fields[listed].value == [True, True, False, True, True, False]
    source.fields[listed] = fields[listed].__class__(
        [True] * 3 + [False] + [True] * 3 + [False], fields[listed].kind
    )
    assert cut(source, OTHERS)[0][listed].value == [
        True,
        True,
        False,
        True,
        True,
        False,
    ]


def test_where_llamacpp_counts_layers_the_period_is_kept(tmp_path):
    source = read_gguf(write_hybrid("qwen35", tmp_path / "dense.gguf"))
    for name in [name for name in source.fields if name.startswith("qwen35.")]:
        source.fields[name.replace("qwen35", "qwen3next")] = source.fields[name]
    source.fields["general.architecture"] = source.fields["general.architecture"].of(
        "qwen3next"
    )
    assert cut(source, PERIOD)[0]["qwen3next.block_count"].value == 4
    with pytest.raises(
        UsageError, match="every 4th layer of qwen3next for one of the full attentions"
    ):
        cut(source, OTHERS)


@pytest.mark.parametrize(
    "name", ["attention.shared_kv_layers", "embedding_length_per_layer_input"]
)
def test_layers_that_depend_on_each_other_are_left_alone(name, tmp_path):
    source = read_gguf(write_hybrid("gemma4", tmp_path / "dense.gguf"))
    source.fields[f"gemma4.{name}"] = source.fields["gemma4.block_count"].of(2)
    with pytest.raises(
        UsageError, match="share keys and values, or each is given an input of its own"
    ):
        cut(source, Plan([1], [1]))


@pytest.mark.parametrize("number", [0.0, float("nan"), float("inf")])
def test_a_number_that_nothing_can_be_divided_by_is_refused(number, tmp_path):
    source = read_gguf(write_hybrid("gemma4", tmp_path / "dense.gguf"))
    held = source.tensors["blk.0.layer_output_scale.weight"]
    source.tensors["blk.0.layer_output_scale.weight"] = held.__class__(
        np.float32([number]), held.quantization
    )
    with pytest.raises(
        UsageError, match=r"layer_output_scale\.weight of block 0; download it again"
    ):
        cut(source, Plan([1], [1]))


def test_an_interval_that_counts_nothing_is_refused(tmp_path):
    source = read_gguf(write_hybrid("qwen35", tmp_path / "dense.gguf"))
    source.fields["qwen35.full_attention_interval"] = source.fields[
        "qwen35.block_count"
    ].of("four")
    with pytest.raises(UsageError, match="'four' for qwen35"):
        cut(source, PERIOD)


def test_a_layer_lacks_what_it_does_not_hold(tmp_path):
    source = read_gguf(write_hybrid("nemotron_h", tmp_path / "dense.gguf"))
    with pytest.raises(
        UsageError, match=r"skips the mlp of layer 0, which has none in dense\.gguf"
    ):
        cut(source, Plan([], [0]))
