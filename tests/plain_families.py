"""Tiny random models of decoders with an attention and an MLP in every layer that
`families` does not hold.
"""

from __future__ import annotations

from typing import Any

from families import (
    COMMON,
    GPT,
    LLAMA,
    MIXED,
    MLA,
    ROUTED,
    TOKENS,
    VISION,
    WINDOW,
    Family,
)
from hybrid_families import ALL, INDEXED, MROPE

SMALL_VISION = VISION | {"image_size": 28, "crop_size": 28}
SMALL_AUDIO = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_blocks": 2,
    "num_attention_heads": 4,
}


def _llama(model_type: str, mlp: str = "mlp", **config: Any) -> Family:
    return Family(model_type, model_type, LLAMA | config, mlp=mlp)


def _bert(model_type: str, **config: Any) -> Family:
    """Its attention adds the stream itself, and norms the sum."""
    sizes = COMMON | {"intermediate_size": 48, "is_decoder": True}
    return Family(model_type, model_type, sizes | config, only_attention=ALL, whole=ALL)


def _bart(model_type: str) -> Family:
    """The decoder alone, without an encoder to look at."""
    sizes = {
        "d_model": 32,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
    }
    return Family(
        model_type,
        model_type,
        TOKENS | sizes | {"max_position_embeddings": 64},
        mlp="fc2",
    )


OTHERS: list[Family] = [
    Family("deepseek_v32", "deepseek_v32", MLA | INDEXED),
    Family(
        "dots3_note_text",
        "dots3_note_text",
        MLA
        | INDEXED
        | {
            "layer_types": ["indexed_attention", "sliding_attention"] * 2,
            "sliding_window": WINDOW,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 16,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 16,
            "swa_qk_nope_head_dim": 8,
            "swa_v_head_dim": 8,
            "shared_experts_intermediate_size": 16,
        },
    ),
    _llama(
        "granitemoe_swa",
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=16,
        residual_multiplier=0.7,
        mlp="block_sparse_moe shared_mlp",
        **MIXED,
    ),
    _llama("apertus1p5_text"),
    _llama(
        "cohere_compass_text",
        logit_scale=0.5,
        rope_parameters={"sliding_attention": MROPE, "full_attention": None},
        **MIXED,
    ),
    Family(
        "dbrx",
        "dbrx",
        TOKENS
        | {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 4,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        },
        only_attention=ALL,
        whole=ALL,
    ),
    Family(
        "ctrl", "ctrl", GPT | {"dff": 48}, attention="multi_head_attention", mlp="ffn"
    ),
    Family("gpt-sw3", "gpt-sw3", GPT, attention="attn"),
    *(_llama(name) for name in ("exaone", "internlm3", "iquestcoder")),
    Family("sarvam_mla", "sarvam_mla", MLA | {"q_lora_rank": None}),
    _llama("sarvam_moe", first_k_dense_replace=1, **ROUTED),
    _llama("moshi"),
    _llama("phi4_multimodal", vision_config=SMALL_VISION, audio_config=SMALL_AUDIO),
    Family("emu3", "emu3", {"text_config": LLAMA}),
    Family("fuyu", "fuyu", {"text_config": LLAMA | {"model_type": "persimmon"}}),
    Family("mllama", "mllama", {"text_config": LLAMA | {"cross_attention_layers": []}}),
    *(
        _bert(name)
        for name in ("megatron-bert", "roberta-prelayernorm", "xlm-roberta-xl")
    ),
    Family(
        "gpt_neox_japanese",
        "gpt_neox_japanese",
        COMMON,
        attention="attention",
        only_attention=(3,),
        whole=(3,),  # its attention answers a bias, which the layer adds
    ),
    *(
        _bart(name)
        for name in ("bigbird_pegasus", "blenderbot", "mbart", "pegasus", "whisper")
    ),
]

# What they add to is normed afterwards
NORMED_AFTER: list[Family] = [
    Family("openai-gpt", "openai-gpt", GPT, attention="attn"),
    *(
        _bert(name)
        for name in (
            "bert",
            "bert-generation",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
        )
    ),
    *(
        _bert(name)
        for name in ("rembert", "roberta", "roc_bert", "roformer", "xlm-roberta")
    ),
    _bert("git", vision_config=VISION),
    _bert("xmod", languages=["en_XX"], default_language="en_XX"),
    _bert("big_bird", attention_type="original_full"),
    *(
        _bart(name)
        for name in ("bart", "blenderbot-small", "marian", "mvp", "plbart", "trocr")
    ),
]
