"""Exports of models that see: the text part is cut, and all else goes along as it
is.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import engines
import notall
from api import export
from families import FAMILIES, TRANSFORMERS_5, Family, family, silenced
from hybrid_families import HYBRIDS
from notall import Plan, UsageError, locate
from test_architectures import prompt
from tiny_checkpoint import save_tiny_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.each_release]

PLANS = {"whole blocks": Plan([1], [1]), "portable": Plan([2], [1])}
IN_PLACE = {"gemma4 (text part)"}
SEEING = [
    one
    for one in [*FAMILIES, *(HYBRIDS if TRANSFORMERS_5 else [])]
    if one.exists
    and one.auto is AutoModelForImageTextToText
    and one.name not in IN_PLACE
]
EACH_TIME = {
    "qwen2_vl (text part)",
    "qwen3_vl (text part)",
    "gemma3 (text part)",
    "qwen3_5 (text part)",
}
IMAGE, TOKENS = (
    5,
    4,
)  # what stands for a piece of an image, and how many of them an image has


def layers_of(settings: dict) -> int:
    return settings["text_config"]["num_hidden_layers"]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(
    "family",
    [
        one if one.name in EACH_TIME else pytest.param(one, marks=pytest.mark.slow)
        for one in SEEING
    ],
    ids=str,
)
@torch.no_grad()
def test_the_text_part_is_cut_and_the_rest_stays(
    family: Family, name: str, tmp_path
) -> None:
    plan, tokens = PLANS[name], prompt(False)[0]
    family.build().save_pretrained(tmp_path / "dense")
    export(tmp_path / "dense", plan, "hf", tmp_path / "cut", verify=False)
    dense, cut = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / one).eval()
        for one in ("dense", "cut")
    )
    with silenced(dense, family, plan.attention, plan.mlp):
        expected = dense(tokens).logits
    assert (cut(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    before, after = (
        load_file(tmp_path / one / "model.safetensors") for one in ("dense", "cut")
    )
    seen = [
        key
        for key in before
        if any(word in key for word in ("vis", "projector", "connector"))
    ]
    assert seen
    assert all(torch.equal(after[key], before[key]) for key in seen)
    assert sum(w.numel() for w in before.values()) - sum(
        w.numel() for w in after.values()
    ) == sum(
        part.parameters
        for part in locate(dense).sublayers
        if part.index in getattr(plan, part.kind)
    )
    engines.works("transformers", "transformers", "hf", family.name, name)


@pytest.mark.skipif(not TRANSFORMERS_5, reason="Gemma 4 is of transformers 5")
@torch.no_grad()
def test_gemma_4_is_cut_where_its_layers_share_nothing(tmp_path) -> None:
    one, plan, tokens = (
        family("gemma4 (text part)"),
        PLANS["portable"],
        prompt(False)[0],
    )
    text = one.config["text_config"] | {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
    }
    one.build(text_config=text).save_pretrained(tmp_path / "dense")
    export(tmp_path / "dense", plan, "hf", tmp_path / "cut", verify=False)
    dense, cut = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / name).eval()
        for name in ("dense", "cut")
    )
    with silenced(dense, one, plan.attention, plan.mlp):
        expected = dense(tokens).logits
    assert (cut(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_what_was_cut_sees_as_it_did(tmp_path) -> None:
    """With an image: as the original model whose text part skips the plan."""
    one = family("llava (text part)")
    sizes = {"image_token_index": IMAGE, "vision_feature_layer": -1}
    one.build(**sizes).save_pretrained(tmp_path / "dense")
    export(tmp_path / "dense", PLANS["portable"], "hf", tmp_path / "cut")
    dense, cut = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / name).eval()
        for name in ("dense", "cut")
    )
    tokens = torch.tensor([[7, *[IMAGE] * TOKENS, 9, 11]])
    seen = {
        "pixel_values": torch.randn(
            1, 3, 8, 8, generator=torch.Generator().manual_seed(0)
        )
    }
    with notall.skip(dense, PLANS["portable"]):
        expected, blind = (
            dense(input_ids=tokens, **seen).logits,
            dense(input_ids=tokens).logits,
        )
    found = cut(input_ids=tokens, **seen).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (
        found - blind
    ).abs().max() > 1e-2 * expected.abs().max()  # the image says something


@pytest.mark.skipif(
    not TRANSFORMERS_5,
    reason="transformers 4 reads such a config, and its own cache fails then",
)
def test_settings_without_parts_are_cut_too(tmp_path) -> None:
    """As Qwen2-VL's published config has those of its text part: beside the others."""
    family("qwen2_vl (text part)").build().save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    settings = json.loads(path.read_text())
    text = settings.pop("text_config")
    path.write_text(json.dumps(text | settings))
    export(tmp_path / "dense", PLANS["portable"], "hf", tmp_path / "cut")
    cut = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert cut["num_hidden_layers"] == 3
    assert "text_config" not in cut


def test_a_part_that_sees_may_have_as_many_layers(tmp_path) -> None:
    one = family("gemma3 (text part)")
    deep = one.config["vision_config"] | {"num_hidden_layers": 4}
    one.build(vision_config=deep).save_pretrained(tmp_path / "dense")
    export(tmp_path / "dense", PLANS["whole blocks"], "hf", tmp_path / "cut")
    settings = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert (layers_of(settings), settings["vision_config"]["num_hidden_layers"]) == (
        3,
        4,
    )


def test_other_targets_say_that_they_hold_text_alone(tmp_path) -> None:
    family("llava (text part)").build().save_pretrained(tmp_path / "dense")
    with pytest.raises(
        UsageError, match="llava is not built of Llama's layers; export to hf"
    ):
        export(tmp_path / "dense", PLANS["portable"], "nemotron-nas", tmp_path / "cut")
    with pytest.raises(
        UsageError, match="skip whole blocks, or choose a portable plan"
    ):
        export(tmp_path / "dense", Plan([1]), "hf", tmp_path / "cut")


@pytest.mark.skipif(not TRANSFORMERS_5, reason="Qwen3.5 is of transformers 5")
@torch.no_grad()
def test_weights_that_were_refit_on_the_text_alone_go_into_the_whole_model(
    tmp_path,
) -> None:
    """transformers can read the text part of such a checkpoint alone, whose names are
    others then.
    """
    family("qwen3_5 (text part)").build().save_pretrained(tmp_path / "dense")
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    tokens = torch.randint(3, 90, (8, 16), generator=torch.Generator().manual_seed(0))
    repaired = notall.repair(text, PLANS["portable"], list(tokens.split(2)))
    assert repaired.weights
    export(
        tmp_path / "dense", repaired, "hf", tmp_path / "cut"
    )  # which compares the two
    with notall.skip(text, repaired):
        expected = text(tokens[:1]).logits
    found = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / "cut")
        .eval()(tokens[:1])
        .logits
    )
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_model_that_only_the_class_of_models_that_see_reads_is_loaded(
    tmp_path,
) -> None:
    text = family("qwen3_vl (text part)").config["text_config"] | {"vocab_size": 259}
    folder = save_tiny_checkpoint(
        tmp_path / "dense", of="qwen3_vl (text part)", text_config=text
    )
    model, tokenizer = notall.load(folder, dtype="float32")
    assert len(locate(model).blocks) == 4
    with notall.skip(model, PLANS["portable"]):
        model.generate(**tokenizer("a b", return_tensors="pt"), max_new_tokens=2)
