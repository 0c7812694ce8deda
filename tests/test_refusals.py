"""What cannot be skipped by halves is refused, each in one clear line that says what was found and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from families import COMMON, LAYERS, LLAMA, TOKENS, VOCABULARY, family
from notall import UnsupportedModel, locate
from verdicts import compare_or_record

HYBRID = ["linear_attention", "full_attention"] * 2
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 8, "mamba_n_groups": 1}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}

# model type: config, what the message says
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gemma3n_text": (
        LLAMA
        | {
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "laurel_rank": 4,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "intermediate_size": [48] * LAYERS,
            "activation_sparsity_pattern": [0.0] * LAYERS,
        },
        "shares keys and values between layers",
    ),
    "gemma4_text": (
        LLAMA
        | {
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        "shares keys and values between layers",
    ),
    "mamba": (TOKENS | {"hidden_size": 32, "num_hidden_layers": LAYERS, "state_size": 8}, "recurrent state"),
    "mamba2": (
        TOKENS
        | {
            "hidden_size": 32,
            "num_hidden_layers": LAYERS,
            "state_size": 8,
            "num_heads": 4,
            "head_dim": 16,
            "n_groups": 1,
        },
        "recurrent state",
    ),
    "falcon_mamba": (TOKENS | {"hidden_size": 32, "num_hidden_layers": LAYERS, "state_size": 8}, "recurrent state"),
    "jamba": (
        LLAMA
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "num_experts": 2,
            "use_mamba_kernels": False,
        },
        "recurrent state",
    ),
    "bamba": (LLAMA | MAMBA | {"attn_layer_indices": [1, 3]}, "recurrent state"),
    "zamba2": (
        LLAMA
        | {
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "num_mem_blocks": 1,
            "adapter_rank": 4,
            "use_mamba_kernels": False,
        },
        "recurrent state",
    ),
    "nemotron_h": (
        LLAMA
        | {
            "hybrid_override_pattern": "M*M-",
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "use_mamba_kernels": False,
        },
        "recurrent state|found 0",
    ),
    "lfm2": (LLAMA | {"layer_types": ["conv", "full_attention"] * 2}, "found 0|conv_cache"),
    "falcon_h1": (LLAMA | MAMBA | {"mamba_d_ssm": 64}, "recurrent state"),
    "granitemoehybrid": (
        LLAMA
        | MAMBA
        | {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": 2, "shared_intermediate_size": 16},
        "recurrent state",
    ),
    "recurrent_gemma": (
        LLAMA | {"block_types": ["recurrent", "attention"], "lru_width": 32},
        "recurrent state|found 0",
    ),
    "qwen3_next": (
        LLAMA
        | DELTA
        | {
            "layer_types": HYBRID,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        "recurrent state",
    ),
    "qwen3_5_text": (LLAMA | DELTA | {"layer_types": HYBRID}, "recurrent state"),
    "olmo_hybrid": (LLAMA | DELTA | {"layer_types": HYBRID}, "recurrent state"),
    "rwkv": (
        TOKENS | {"hidden_size": 32, "num_hidden_layers": LAYERS, "attention_hidden_size": 32},
        "recurrent state|residual",
    ),
    "zaya": (LLAMA, "recurrent state"),
    "bert": (COMMON | {"intermediate_size": 48, "is_decoder": True}, "residual addition"),
    "openai-gpt": (
        TOKENS | {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64},
        "changes its hidden states",
    ),
    "gpt_neox_japanese": (COMMON, "does not come from its residual stream"),
    "doge": (LLAMA | {"keep_window_size": 64}, "layer itself computes"),
    "bart": (
        {
            "d_model": 32,
            "vocab_size": VOCABULARY,
            "encoder_layers": LAYERS,
            "decoder_layers": LAYERS,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
        },
        ".",
    ),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_with_a_reason(model_type: str) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    config, reason = REFUSED[model_type]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config)).eval()
    with pytest.raises(UnsupportedModel, match=reason) as refusal:
        locate(model)
    said = str(refusal.value)
    assert "\n" not in said
    compare_or_record(model_type, verdict="refused", reason=said)


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_encoder_decoder(model_type: str) -> None:
    sizes = {"d_model": 32, "vocab_size": VOCABULARY, "decoder_start_token_id": 0}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(model_type, **sizes))
    with pytest.raises(UnsupportedModel, match="encoder-decoder") as refusal:
        locate(model)
    compare_or_record(f"{model_type} (encoder-decoder)", verdict="refused", reason=str(refusal.value))


@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="this transformers has no gemma4_text")
def test_gemma4_that_shares_nothing_still_scales_its_stream() -> None:
    config = REFUSED["gemma4_text"][0] | {"num_kv_shared_layers": 0}
    with pytest.raises(UnsupportedModel, match="mul_ after its last residual addition"):
        locate(AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text", **config)))


@pytest.mark.skipif("zaya" not in CONFIG_MAPPING, reason="this transformers has no zaya")
def test_layers_that_hand_each_other_more_than_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("zaya", **LLAMA)).eval()
    monkeypatch.setattr(model, "_is_stateful", False)
    with pytest.raises(UnsupportedModel, match="more than the hidden states"):
        locate(model)


def test_module_that_scales_the_stream_it_is_given() -> None:
    model = family("bloom").build()
    model.transformer.h[1].mlp.register_forward_hook(lambda mlp, args, answer: answer + 0.5 * args[1])
    with pytest.raises(UnsupportedModel, match="mlp changes the residual stream"):
        locate(model)


def test_a_layer_that_answers_no_number_is_not_proved() -> None:
    model = family("llama").build()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(UnsupportedModel, match=r"layer 1 .* differs from its recomposition by nan"):
        locate(model)


def test_model_without_a_list_of_layers() -> None:
    model = family("llama").build()
    model.model.layers = torch.nn.ModuleDict({str(i): layer for i, layer in enumerate(model.model.layers)})
    with pytest.raises(UnsupportedModel, match="no list of 4 decoder layers"):
        locate(model)
