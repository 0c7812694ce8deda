"""transformers' own form of a plan, `per_layer_config` with `skip`: no release reads
it, so no export writes it.
"""

import json

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from api import Origin, export, manifest_of, read_manifest
from families import TRANSFORMERS_5, family
from notall import Plan

IDS = torch.arange(2 * 11).view(2, 11) * 7 % 90 + 3
PLAN = Plan(attention=[1], mlp=[2])
WHAT_TO_DO = (
    f"transformers {transformers.__version__} reads what per_layer_config skips: have"
    " exporters/hf.py write that form, which notall.json holds already, beside the"
    " regrouped one; check it there as any export; say in docs/engines.md from which"
    " release on it is read; and have this test look at older releases only"
)


def test_no_transformers_here_reads_what_a_layer_skips(tmp_path):
    """5.17 and newer take it into the config, and build and run every sublayer all
    the same.
    """
    dense = family("llama").build("sdpa")
    dense.save_pretrained(tmp_path)
    form = manifest_of(Origin("tiny", "", 4, "", ""), PLAN, "llama")["per_layer_config"]
    assert form == {"1": {"skip": ["attention"]}, "2": {"skip": ["mlp"]}}
    config = AutoConfig.from_pretrained(tmp_path, per_layer_config=form)
    if TRANSFORMERS_5:
        assert [layer.skip for layer in config.per_layer_config] == [
            [],
            ["attention"],
            ["mlp"],
            [],
        ]
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path, config=config, dtype=torch.float32
    ).eval()
    assert found.state_dict().keys() == dense.state_dict().keys(), WHAT_TO_DO
    with torch.no_grad():
        assert torch.equal(found(IDS).logits, dense(IDS).logits), WHAT_TO_DO


def test_no_export_writes_it(tmp_path):
    export(family("llama").build(), PLAN, "hf", tmp_path / "out", verify=False)
    assert "per_layer_config" not in json.loads(
        (tmp_path / "out" / "config.json").read_text()
    )
    assert "per_layer_config" in read_manifest(tmp_path / "out")
