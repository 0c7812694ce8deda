"""docs/upstream/llmcompressor_skip.py: a plan of notall in a recipe of
llm-compressor.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import engines
import notall
from notall import Plan, UsageError
from tiny_checkpoint import save_tiny_checkpoint

pytestmark = engines.needs("llmcompressor", "make test-llmcompressor")
FILE = Path(__file__).parent.parent / "docs/upstream/llmcompressor_skip.py"
PORTABLE = Plan([1, 3], [1, 2])


@pytest.fixture(scope="module")
def modifier():
    spec = importlib.util.spec_from_file_location(FILE.stem, FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SkipModifier


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_checkpoint(
        tmp_path_factory.mktemp("tiny") / "model", num_hidden_layers=5
    )


def quantised(model, out, *first):
    """The config and the tensors of a checkpoint in 8 bits, after a recipe that begins
    with these.
    """
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    eight = QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])
    oneshot(model=str(model), recipe=[*first, eight], output_dir=str(out))
    return json.loads((out / "config.json").read_text()), load_file(
        out / "model.safetensors"
    )


def test_what_it_leaves_is_what_an_export_leaves(modifier, tiny, tmp_path):
    PORTABLE.save(tmp_path / "plan.json")
    config, ours = quantised(
        tiny, tmp_path / "ours", modifier(plan=str(tmp_path / "plan.json"))
    )
    notall.export(str(tiny), PORTABLE, "hf", tmp_path / "export")
    like, theirs = quantised(tmp_path / "export", tmp_path / "theirs")
    assert config["num_hidden_layers"] == like["num_hidden_layers"] == 3
    assert config["quantization_config"] == like["quantization_config"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert sum(tensor.dtype == torch.int8 for tensor in ours.values()) == 3 * 7


def test_a_plan_that_is_not_portable_is_refused(modifier, tiny, tmp_path):
    Plan([1]).save(tmp_path / "plan.json")
    with pytest.raises(
        UsageError, match="leaves no ordinary checkpoint: give a portable plan"
    ):
        quantised(tiny, tmp_path / "out", modifier(plan=str(tmp_path / "plan.json")))
