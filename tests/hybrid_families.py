"""Tiny random models, as in `families`, whose layers hold other mixers than attention
or do not just add to a stream.

Each kind of layer is there, and two full attentions wherever there are any, so that all
but one can go.
"""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForImageTextToText

from families import (
    COMMON,
    EXPERTS,
    LLAMA,
    MIXED,
    MLA,
    POST_NORMS,
    ROUTED,
    TOKENS,
    VISION,
    VOCABULARY,
    WINDOW,
    Family,
)

DELTA = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
CHUNK = 5  # tokens that are scanned together: texts of the tests are longer
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": CHUNK,
}
# Fewer heads would give many tokens the same score, 0, and which of them is looked at
# would be chance.
INDEXED = {"index_n_heads": 16, "index_head_dim": 16, "index_topk": WINDOW}
INKLING = ROUTED | {
    "layer_types": ["hybrid_sliding", "hybrid"] * 2,
    "sliding_window_size": WINDOW,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "d_rel": 4,
    "rel_extent": 8,
}
INKLING2 = INKLING | {
    "unpadded_vocab_size": VOCABULARY,
    "attention": "post_attention_convolution",
    "mlp": "post_mlp_convolution",
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
QWEN4 = (
    EXPERTS
    | DELTA
    | {
        "hc_count": 2,
        "hc_lowrank": 8,
        "shared_expert_intermediate_size": 16,
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 2,
        "indexer_compress_ratio": 2,
    }
)
BARE = TOKENS | {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 8}
ALL = (0, 1, 2, 3)
SHARED = ((0, (2,)), (1, (3,)))  # keys and values, of the layers of one kind
INDICES = ((0, (1,)), (2, (3,)))


def _llama(
    name: str,
    model_type: str | None = None,
    *,
    attention: str = "linear_attn|self_attn",
    mlp: str = "mlp",
    whole: tuple[int, ...] = (),
    lends: tuple[tuple[int, tuple[int, ...]], ...] = (),
    **config: Any,
) -> Family:
    """`whole` layers, and those whose attention others read: see `Family`."""
    return Family(
        name,
        model_type or name,
        LLAMA | config,
        attention,
        mlp,
        only_attention=whole,
        whole=whole,
        lends=lends,
    )


def _sees(model_type: str, **text: Any) -> Family:
    vision = VISION | {"depth": 2, "num_heads": 4, "out_hidden_size": 32}
    return Family(
        f"{model_type} (text part)",
        model_type,
        {
            "text_config": LLAMA | {"rope_parameters": MROPE} | text,
            "vision_config": vision,
        },
        attention="linear_attn|self_attn",
        auto=AutoModelForImageTextToText,
    )


HYBRIDS: list[Family] = [
    # A mixer, then an MLP
    _llama(
        "qwen3_next",
        shared_expert_intermediate_size=16,
        mlp_only_layers=[3],
        **EXPERTS,
        **DELTA,
    ),
    _llama("qwen3_5_text", **DELTA),
    _llama("qwen3_5_moe_text", shared_expert_intermediate_size=16, **EXPERTS, **DELTA),
    _llama(
        "olmo_hybrid",
        attention="linear_attn|post_attention_layernorm",
        mlp="post_feedforward_layernorm|mlp",
        **DELTA,
    ),
    _llama(
        "lara_mini",
        shared_expert_intermediate_size=16,
        sliding_window=WINDOW,
        **EXPERTS,
        **DELTA
        | {
            "layer_types": [
                "linear_attention",
                "full_attention",
                "sliding_attention",
                "full_attention",
            ]
        },
    ),
    _llama(
        "lfm2",
        layer_types=["conv", "full_attention"] * 2,
        attention="conv|self_attn",
        mlp="feed_forward",
    ),
    _llama(
        "lfm2_moe",
        layer_types=["full_attention", "conv", "conv", "full_attention"],
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
        ssm_multipliers=[0.9, 1.1, 0.8, 1.2, 0.7],
        mlp_multipliers=[0.9, 1.1],
        attention_in_multiplier=0.8,
        attention_out_multiplier=0.9,
        attention="mamba self_attn",
        mlp="feed_forward",
        **MAMBA,
    ),
    _llama(
        "granitemoehybrid",
        layer_types=[
            "full_attention",
            "linear_attention",
            "linear_attention",
            "full_attention",
        ],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=16,
        residual_multiplier=0.7,
        attention="mamba|self_attn",
        mlp="block_sparse_moe shared_mlp",
        **MAMBA,
    ),
    _llama(
        "granitemoehybrid (dense)",
        "granitemoehybrid",
        layer_types=["linear_attention", "full_attention"] * 2,
        num_local_experts=0,
        shared_intermediate_size=48,
        position_embedding_type="rope",
        attention="mamba|self_attn",
        mlp="shared_mlp",
        **MAMBA,
    ),
    _llama(
        "bamba",
        attn_layer_indices=[0, 3],
        attention="mamba|self_attn",
        mlp="feed_forward",
        **MAMBA,
    ),
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
            "layer_types": ["linear_attention", "full_attention"] * 2,
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
            "layer_types": [
                "full_attention",
                "linear_attention",
                "linear_attention",
                "full_attention",
            ],
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
            "chunk_size": CHUNK,
            "moe_shared_expert_intermediate_size": 16,
            "time_step_min": (
                1e-9
            ),  # below it steps are lengthened, but not token by token
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
        BARE | {"num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": CHUNK},
        attention="mixer",
        mlp="",
        only_attention=ALL,
    ),
    Family(
        "falcon_mamba",
        "falcon_mamba",
        BARE,
        attention="mixer",
        mlp="",
        only_attention=ALL,
    ),
    # A shared attention feeds Mamba's input, and adds nothing itself
    Family(
        "zamba",
        "zamba",
        COMMON
        | {
            "intermediate_size": 48,
            "num_key_value_heads": 4,
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "mamba_d_state": 8,
        },
        attention="mamba|mamba_decoder.mamba",
        mlp="",
        only_attention=ALL,
    ),
    Family(
        "zamba2",
        "zamba2",
        COMMON
        | {
            "intermediate_size": 48,
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "mamba_d_state": 8,
            "mamba_ngroups": 2,
            "n_mamba_heads": 4,
            "num_mem_blocks": 1,
            "adapter_rank": 4,
            "use_mem_rope": True,
            "chunk_size": CHUNK,
            "time_step_min": 1e-9,
        },
        attention="mamba|mamba_decoder.mamba",
        mlp="",
        only_attention=ALL,
    ),
    # The stream is scaled or mixed between the layers
    _llama(
        "doge", keep_window_size=64, attention="self_attn"
    ),  # within it, no two equal tokens need be chosen from
    _llama(
        "minimax",
        layer_types=["full_attention", "linear_attention"] * 2,
        num_local_experts=4,
        block_size=CHUNK,
        full_attn_alpha_factor=1.1,
        linear_attn_beta_factor=0.9,
        mlp_alpha_factor=1.2,
        attention="self_attn",
    ),
    _llama(
        "beam",
        n_group=2,
        topk_group=1,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        **EXPERTS,
        **MIXED,
        **POST_NORMS,
    ),
    _llama(
        "ergo",
        first_dense_intermediate_size=48,
        shared_intermediate_size=16,
        **EXPERTS,
        **MIXED,
    ),
    _llama(
        "kolibri1_1",
        head_dim=16,
        layer_types=["sliding_attention", "indexed_attention"] * 2,
        sliding_window=WINDOW,
        shared_expert_intermediate_size=16,
        mlp_only_layers=[0],
        mlp_only_intermediate_size=48,
        index_layers=[1, 3],
        kv_source_layers=[0, 1, 2, 3],
        index_num_heads=2,
        index_topk=64,
        index_pool_size=32,
        index_compression=4,
        index_num_local_tokens=8,
        index_num_sink_tokens=2,
        **EXPERTS,
    ),
    _llama(
        "zaya",
        layer_types=["hybrid_sliding", "hybrid"] * 2,
        sliding_window=WINDOW,
        router_hidden_size=16,
        attention="self_attn",
        **EXPERTS | {"num_experts_per_tok": 1},
    ),
    Family(
        "deepseek_v4",
        "deepseek_v4",
        COMMON
        | ROUTED
        | {
            "head_dim": 8,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "layer_types": [
                "sliding_attention",
                "compressed_sparse_attention",
                "heavily_compressed_attention",
                "compressed_sparse_attention",
            ],
            "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
            "compress_rates": {
                "compressed_sparse_attention": 2,
                "heavily_compressed_attention": 4,
            },
            "hc_mult": 2,
            "sliding_window": WINDOW,
            "o_groups": 2,
            "o_lora_rank": 8,
            "index_n_heads": 16,
            "index_head_dim": 8,
            "index_topk": 2,
        },
    ),
    _llama(
        "gemma3n_text",
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=WINDOW,
        num_kv_shared_layers=2,
        laurel_rank=4,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        intermediate_size=[48] * 4,
        lends=SHARED,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
        **POST_NORMS,
    ),
    _llama(
        "gemma4_text",
        num_kv_shared_layers=2,
        lends=SHARED,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        global_head_dim=16,
        **MIXED,
        **POST_NORMS,
    ),
    _llama(
        "gemma4_text (experts)",
        "gemma4_text",
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=16,
        global_head_dim=16,
        **MIXED,
        **POST_NORMS,
    ),
    _llama(
        "gemma4_text (nothing shared)",
        "gemma4_text",
        hidden_size_per_layer_input=0,
        global_head_dim=16,
        **MIXED,
        **POST_NORMS,
    ),
    _llama(
        "gemma4_unified_text",
        num_kv_shared_layers=2,
        lends=SHARED,
        global_head_dim=16,
        **MIXED,
        **POST_NORMS,
    ),
    Family(
        "glm_moe_dsa",
        "glm_moe_dsa",
        MLA | INDEXED | {"indexer_types": ["full", "shared"] * 2},
        lends=INDICES,
    ),
    Family(
        "hy_v4",
        "hy_v4",
        MLA | INDEXED | {"indexer_types": ["full", "shared"] * 2, "hc_mult": 2},
        lends=INDICES,
    ),
    _llama(
        "inkling_text",
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        whole=ALL,  # their MLPs keep a state
        **INKLING,
    ),
    _llama(
        "qwen4_exp_text", whole=ALL, **QWEN4
    ),  # it looks for positions in the place of its first attention
    _llama(
        "qwen4_exp_text (n-grams)",
        "qwen4_exp_text",
        whole=ALL,
        eos_token_id=2,
        ple_layer_ids=[1, 3],
        ple_embed_dim=16,
        heads_per_ngram=2,
        ngram_vocab_size_base=20,
        make_ngram_vocab_size_divisible_by=8,
        split_ngram_parts=1,
        **QWEN4,
    ),
    # Several attentions in a layer, or layers that run several times, or begin a stream
    # of their own
    Family(
        "longcat_flash",
        "longcat_flash",
        {name: value for name, value in MLA.items() if name != "num_hidden_layers"}
        | {
            "num_layers": 4,
            "head_dim": 8,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 16,
            "moe_topk": 2,
            "zero_expert_num": 1,
        },
        attention="self_attn.0 self_attn.1",
        mlp="mlps.0 mlps.1 mlp",
    ),
    _llama("inkling2_text", n_layers_per_attn_res_block=2, **INKLING2),
    _llama(
        "inkling2_loop_text",
        n_layers_per_attn_res_block=1,
        loop_layer_index_start=1,
        loop_layer_index_end=3,
        loop_num_passes=2,
        loop_gate_rank=4,
        **INKLING2,
    ),
    # The text parts of vision-language models
    _sees("qwen3_5", **DELTA),
    Family(
        "gemma4 (text part)",
        "gemma4",
        {
            "text_config": (
                LLAMA
                | MIXED
                | {
                    "model_type": "gemma4_text",
                    "num_kv_shared_layers": 2,
                    "hidden_size_per_layer_input": 8,
                    "vocab_size_per_layer_input": VOCABULARY,
                    "global_head_dim": 16,
                }
            ),
            "vision_config": (
                VISION
                | {
                    "num_key_value_heads": 4,
                    "head_dim": 8,
                    "position_embedding_size": 64,
                }
            ),
            "audio_config": None,
        },
        lends=SHARED,
        auto=AutoModelForImageTextToText,
        **POST_NORMS,
    ),
    _sees("qwen3_5_moe", shared_expert_intermediate_size=16, **EXPERTS, **DELTA),
]

# One of each way to build a layer; the others come with `make test-engines`.
QUICK = {
    "gemma4_text",
    "qwen3_next",
    "nemotron_h",
}


def marks(family: Family) -> list[pytest.MarkDecorator]:
    return [] if family.name in QUICK else [pytest.mark.slow]
