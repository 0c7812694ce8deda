"""A tiny random model of every family whose layers do not all hold an attention and an MLP: see `families`.

Each kind of layer is there, and two full attentions wherever there are any, so that all but one can go.
"""

from __future__ import annotations

from typing import Any

from families import EXPERTS, LLAMA, MLA, ROUTED, TOKENS, WINDOW, Family

DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 8, "mamba_n_groups": 2}
BARE = TOKENS | {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 8}
ALL = (0, 1, 2, 3)


def _llama(model_type: str, *, attention: str = "linear_attn|self_attn", mlp: str = "mlp", **config: Any) -> Family:
    return Family(model_type, model_type, LLAMA | config, attention, mlp)


HYBRIDS = [
    # A mixer, then an MLP
    _llama("qwen3_next", shared_expert_intermediate_size=16, mlp_only_layers=[3], **EXPERTS, **DELTA),
    _llama("qwen3_5_text", **DELTA),
    _llama("qwen3_5_moe_text", shared_expert_intermediate_size=16, **EXPERTS, **DELTA),
    _llama(
        "olmo_hybrid", attention="linear_attn|post_attention_layernorm", mlp="post_feedforward_layernorm|mlp", **DELTA
    ),
    _llama(
        "lara_mini",
        shared_expert_intermediate_size=16,
        sliding_window=WINDOW,
        **EXPERTS,
        **DELTA | {"layer_types": ["linear_attention", "full_attention", "sliding_attention", "full_attention"]},
    ),
    _llama(
        "lfm2",
        layer_types=["conv", "full_attention", "conv", "full_attention"],
        attention="conv|self_attn",
        mlp="feed_forward",
    ),
    _llama(
        "lfm2_moe",
        layer_types=["conv", "full_attention", "conv", "full_attention"],
        num_dense_layers=1,
        attention="conv|self_attn",
        mlp="feed_forward",
        **EXPERTS,
    ),
    _llama(
        "lfm3",
        layer_types=["conv", "full_attention", "sliding_attention", "full_attention"],
        sliding_window=WINDOW,
        attention="post_operator_norm",
        mlp="post_ffn_norm",
    ),
    _llama(
        "falcon_h1",
        mamba_d_ssm=64,
        ssm_out_multiplier=0.7,
        attention_in_multiplier=0.8,
        attention_out_multiplier=0.9,
        attention="mamba self_attn",
        mlp="feed_forward",
        **MAMBA,
    ),
    _llama(
        "granitemoehybrid",
        layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=16,
        residual_multiplier=0.7,
        attention="mamba|self_attn",
        mlp="block_sparse_moe shared_mlp",
        **MAMBA,
    ),
    _llama("bamba", attn_layer_indices=[1, 3], attention="mamba|self_attn", mlp="feed_forward", **MAMBA),
    _llama(
        "jamba",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=3,
        expert_layer_offset=1,
        mamba_d_state=8,
        num_experts=4,
        num_experts_per_tok=2,
        attention="mamba|self_attn",
        mlp="feed_forward",
    ),
    Family(
        "kimi_linear",
        "kimi_linear",
        {k: v for k, v in MLA.items() if k != "first_k_dense_replace"}
        | {
            "num_experts": 4,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "linear_num_heads": 4,
            "linear_head_dim": 8,
        },
    ),
    Family(
        "bailing_hybrid",
        "bailing_hybrid",
        MLA
        | {
            "num_local_experts": 4,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        },
    ),
    _llama(
        "recurrent_gemma",
        block_types=["recurrent", "attention"],
        attention_window_size=WINDOW,
        lru_width=32,
        attention="temporal_block",
        mlp="mlp_block",
    ),
    # One sublayer a layer
    Family(
        "nemotron_h",
        "nemotron_h",
        LLAMA
        | ROUTED
        | {
            "num_hidden_layers": 6,
            "hybrid_override_pattern": "M*-ME*",
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
            "moe_shared_expert_intermediate_size": 16,
            "time_step_min": 1e-9,  # below it steps are lengthened, but not token by token
        },
        attention="mixer",
        mlp="mixer",
        only_attention=(0, 1, 3, 5),
        only_mlp=(2, 4),
    ),
    Family("mamba", "mamba", BARE, attention="mixer", mlp="", only_attention=ALL),
    Family(
        "mamba2",
        "mamba2",
        BARE | {"num_heads": 4, "head_dim": 16, "n_groups": 2},
        attention="mixer",
        mlp="",
        only_attention=ALL,
    ),
    Family("falcon_mamba", "falcon_mamba", BARE, attention="mixer", mlp="", only_attention=ALL),
]
