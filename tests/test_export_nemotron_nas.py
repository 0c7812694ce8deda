"""nemotron-nas checkpoints: their blocks, their padding, and (where MLX-LM is) that it
answers as the skipped model.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import engines
from api import ffn_mult, nemotron_nas
from families import family
from notall import Plan, UsageError, export

MIXED = Plan(attention=[0, 3], mlp=[1])
PLANS = {
    "block": Plan([1], [1]),
    "attention": Plan([0, 2]),
    "MLP": Plan(mlp=[1, 3]),
    "mixed": MIXED,
}
FITTING = {"llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}}
needs_mlx = engines.needs("mlx_lm")


@needs_mlx
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize("theta", [10_000.0, 500.0])
def test_mlx_answers_as_the_skipped_model(name, plan, theta, tmp_path):
    """`export` itself compares, where MLX-LM is installed; with the RoPE base of
    transformers 4 and another one.
    """
    model = family(name).build(**FITTING[name], rope_theta=theta)
    export(model, plan, "nemotron-nas", tmp_path / "out")
    engines.works("MLX-LM", "mlx-lm", "nemotron-nas", name, "any")


@needs_mlx
def test_a_wrong_answer_leaves_nothing(tmp_path, monkeypatch):
    right = nemotron_nas.logits_in_mlx
    monkeypatch.setattr(
        nemotron_nas,
        "logits_in_mlx",
        lambda folder, tokens: right(folder, tokens) * 1.01,
    )
    with pytest.raises(UsageError, match="answers differently"):
        export(family("llama").build(), MIXED, "nemotron-nas", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@needs_mlx
def test_mlx_holds_a_cache_for_live_attentions_only(tmp_path):
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    out = export(family("llama").build(), MIXED, "nemotron-nas", tmp_path / "out")
    assert (
        len(
            [
                cache
                for cache in make_prompt_cache(load_model(out)[0])
                if cache is not None
            ]
        )
        == 2
    )


def test_blocks_say_what_they_lack(tmp_path):
    out = export(
        family("llama").build(), MIXED, "nemotron-nas", tmp_path / "out", verify=False
    )
    settings = json.loads((out / "config.json").read_text())
    # M0, A1, A2 M2, M3
    assert [block["attention"]["no_op"] for block in settings["block_configs"]] == [
        True,
        False,
        False,
        True,
    ]
    assert [block["ffn"]["no_op"] for block in settings["block_configs"]] == [
        False,
        True,
        False,
        False,
    ]
    assert settings["num_hidden_layers"] == 4
    assert (settings["model_type"], settings["rope_theta"]) == (
        "nemotron-nas",
        10_000.0,
    )
    weights = load_file(out / "model.safetensors")
    assert "model.layers.0.input_layernorm.weight" not in weights
    assert "model.layers.1.post_attention_layernorm.weight" not in weights


def test_a_rope_base_that_llamas_config_leaves_out_is_written(tmp_path):
    """Its default is 10,000; DeciLM's is another."""
    family("llama").build().save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps(
            {
                name: value
                for name, value in config.items()
                if not name.startswith("rope_")
            }
        )
    )
    out = export(
        tmp_path / "dense", MIXED, "nemotron-nas", tmp_path / "out", verify=False
    )
    assert json.loads((out / "config.json").read_text())["rope_theta"] == 10_000.0


def test_narrow_mlps_are_padded_with_zeros(tmp_path):
    model = family("llama").build()  # 48 wide
    weights = load_file(
        export(model, PLANS["block"], "nemotron-nas", tmp_path / "out", verify=False)
        / "model.safetensors"
    )
    for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        dense = model.get_submodule(f"model.layers.2.mlp.{name}").weight
        padded = weights[f"model.layers.1.mlp.{name}.weight"]
        assert padded.shape[dim] == 256
        assert torch.equal(padded.narrow(dim, 0, 48), dense)
        assert not padded.narrow(dim, 48, 208).any()


@pytest.mark.parametrize(
    ("width", "hidden"),
    [(1536, 576), (11008, 4096), (14336, 4096), (8960, 1536), (28672, 8192)],
)
def test_the_multiplier_gives_the_width_back(width, hidden):
    computed = int(2 * ffn_mult(width, hidden) * hidden / 3)
    assert computed + -computed % 256 == width


def test_its_config_has_objects_for_blocks(tmp_path):
    out = export(
        family("llama").build(), MIXED, "nemotron-nas", tmp_path / "out", verify=False
    )
    config = AutoConfig.from_pretrained(out, trust_remote_code=True)
    assert config.block_configs[0].attention.no_op
    assert not hasattr(config.block_configs[0].attention, "absent")
    config.save_pretrained(tmp_path / "again")
    assert (
        json.loads((tmp_path / "again" / "config.json").read_text())["block_configs"][
            0
        ]["ffn"]["no_op"]
        is False
    )


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("qwen3", {}, "not built of Llama's layers"),
        ("mistral", {}, "a window of 5 tokens"),
        ("llama", {"head_dim": 16}, "its heads"),
        ("llama", {"hidden_act": "gelu"}, "activation is gelu"),
    ],
)
def test_what_does_not_fit_is_refused(name, changes, reason, tmp_path):
    with pytest.raises(UsageError, match=reason) as refusal:
        export(family(name).build(**changes), MIXED, "nemotron-nas", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    variant = "".join(f" ({key}={value})" for key, value in changes.items())
    engines.refused("nemotron-nas", name + variant, "any", str(refusal.value))


def test_what_vllm_cannot_take_is_warned_of(tmp_path, caplog):
    out = export(
        family("llama").build(), MIXED, "nemotron-nas", tmp_path / "out", verify=False
    )
    assert "for vLLM export to hf" in caplog.text
    assert "for vLLM export to hf" in (out / "README.md").read_text()
    caplog.clear()
    export(
        family("llama").build(),
        PLANS["block"],
        "nemotron-nas",
        tmp_path / "other",
        verify=False,
    )
    assert not caplog.text
