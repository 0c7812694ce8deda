"""A tiny random model of every architecture: 4 layers of 32 channels, with weights
large enough that each matters.

One row a family. `attention` and `mlp` name, below a layer, the module whose answer
*is* that sublayer's contribution, read off transformers' sources by hand: the tests
silence these to make the slow twin, and never ask `notall` for them. `a b` are two
modules that go together; of `a|b`, a layer has either.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from verdicts import LINE, RECORDING, read

logging.getLogger("transformers").setLevel(logging.ERROR)

VOCABULARY, LAYERS = 99, 4
WINDOW = 5  # shorter than the texts of the tests, so that windows matter
TRANSFORMERS = tuple(map(int, transformers.__version__.split(".")[:2]))
TRANSFORMERS_5 = TRANSFORMERS >= (5, 0)
REFUSED_IN_4 = {
    "gpt2 (scaled by layer)"
}  # there the attention divides by the very index that addresses the cache

SIZES = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
TOKENS = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
COMMON = SIZES | TOKENS | {"max_position_embeddings": 64}
LLAMA = COMMON | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
GPT = TOKENS | {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
MIXED = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
}
SLIDING = {"sliding_window": WINDOW}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
ROPE_FIELD = "rope_parameters" if TRANSFORMERS_5 else "rope_scaling"
MROPE = {
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
}
# Multi-head latent attention, with the first layer dense.
MLA = COMMON | ROUTED | {
    "intermediate_size": 48, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    name: str  # as in the table users read
    model_type: str
    config: dict[str, Any]
    attention: str = "self_attn"
    mlp: str = "mlp"
    adds_itself: tuple[
        str, ...
    ] = ()  # modules that are given the residual and answer the new stream
    only_attention: tuple[int, ...] = ()  # layers without an MLP
    only_mlp: tuple[int, ...] = ()  # layers without an attention
    whole: tuple[
        int, ...
        # layers that are one sublayer: they add nothing where they answer what they are
        # given
    ] = ()
    lends: tuple[
        tuple[int, tuple[int, ...]], ...
    ] = ()  # layers whose attention is read by those of others
    auto: Any = AutoModelForCausalLM

    @property
    def exists(self) -> bool:
        return self.model_type in CONFIG_MAPPING

    @property
    def depth(self) -> int:
        return self.config.get("num_hidden_layers", LAYERS)

    def build(
        self, attn_implementation: str = "eager", **changes: Any
    ) -> PreTrainedModel:
        """The model, in eval mode and float32, the same weights each time. Raises
        `ValueError` for an attention it lacks.
        """
        torch.manual_seed(0)
        config = AutoConfig.for_model(self.model_type, **self.config | changes)
        model = self.auto.from_config(config, attn_implementation=attn_implementation)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        make_each_layer_matter(model)
        return model.eval()

    def __str__(self) -> str:
        return self.name


def make_each_layer_matter(model: nn.Module) -> None:
    """Weights that keep the variance of what they are given, and norms and biases away
    from ones and zeros.
    """
    generator = torch.Generator().manual_seed(1)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for tensor in (*model.parameters(), *_learned_buffers(model)):
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() < 2:
            tensor.data.add_(0.2 * noise)
        else:
            fan_in = 1 if id(tensor) in embeddings else min(tensor.shape[-2:])
            tensor.data.copy_(noise / fan_in**0.5)
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):  # which of four experts are for a token
            table.copy_(torch.randint(4, table.shape, generator=generator))


def _learned_buffers(model: nn.Module) -> Iterator[torch.Tensor]:
    """Routers of the DeepSeek kind keep a learned bias in a buffer, and Gemma 4 the
    scale of a layer.
    """
    learned = ("correction_bias", "expert_bias", "layer_scalar")
    return (buffer for name, buffer in model.named_buffers() if name.endswith(learned))


def _llama(name: str, model_type: str | None = None, **config: Any) -> Family:
    modules = {key: config.pop(key) for key in ("attention", "mlp") if key in config}
    return Family(name, model_type or name, LLAMA | config, **modules)


def _gpt(
    name: str,
    model_type: str | None = None,
    *,
    attention: str = "attn",
    mlp: str = "mlp",
    **config: Any,
) -> Family:
    return Family(name, model_type or name, GPT | config, attention, mlp)


def _sees(
    name: str, text: dict[str, Any], vision: dict[str, Any], **config: Any
) -> Family:
    """The text part of a vision-language model; two layers of vision stand by."""
    return Family(
        f"{name} (text part)",
        name,
        {"text_config": LLAMA | text, "vision_config": VISION | vision} | config,
        auto=AutoModelForImageTextToText,
    )


def _mla(name: str, **config: Any) -> Family:
    return Family(name, name, MLA | config)


POST_NORMS = {
    "attention": "post_attention_layernorm",
    "mlp": "post_feedforward_layernorm",
}

FAMILIES = [
    _llama("llama"),
    _llama("mistral", **SLIDING),
    _llama("ministral", **MIXED),
    _llama("ministral3"),
    _llama("qwen2"),
    _llama(
        "qwen2 (sliding)",
        "qwen2",
        use_sliding_window=True,
        max_window_layers=2,
        **SLIDING,
    ),
    _llama("qwen3"),
    _llama("smollm3", no_rope_layers=[1, 0, 1, 0], pad_token_id=0),
    _llama("gemma"),
    _llama(
        "gemma2",
        query_pre_attn_scalar=8,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
        **MIXED,
        **POST_NORMS,
    ),
    _llama("gemma3", "gemma3_text", query_pre_attn_scalar=8, **MIXED, **POST_NORMS),
    _llama("vaultgemma", query_pre_attn_scalar=8, **MIXED),
    Family("phi", "phi", COMMON | {"intermediate_size": 48, "num_key_value_heads": 2}),
    _llama("phi3", **SLIDING),
    _gpt("gpt2"),
    _gpt(
        "gpt2 (scaled by layer)",
        "gpt2",
        scale_attn_by_inverse_layer_idx=True,
        reorder_and_upcast_attn=True,
    ),
    _gpt("gpt_bigcode"),
    _gpt("gptj", rotary_dim=4),
    _gpt("codegen", rotary_dim=4, n_ctx=64),
    Family(
        "gpt_neo",
        "gpt_neo",
        COMMON
        | {
            "num_layers": LAYERS,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": WINDOW,
        },
        attention="attn",
    ),
    Family(
        "gpt_neox",
        "gpt_neox",
        COMMON | {"intermediate_size": 48, "rotary_pct": 0.5},
        attention="attention",
    ),
    Family(
        "gpt_neox (sequential)",
        "gpt_neox",
        COMMON | {"intermediate_size": 48, "use_parallel_residual": False},
        attention="attention",
    ),
    Family(
        "opt", "opt", COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32}, mlp="fc2"
    ),
    Family(
        "bloom",
        "bloom",
        TOKENS | {"hidden_size": 32, "n_layer": LAYERS, "n_head": 4},
        attention="self_attention",
        adds_itself=("self_attention", "mlp"),
    ),
    Family(
        "mpt",
        "mpt",
        TOKENS
        | {
            "d_model": 32,
            "n_layers": LAYERS,
            "n_heads": 4,
            "expansion_ratio": 2,
            "max_seq_len": 64,
        },
        attention="attn",
        mlp="ffn",
        adds_itself=("ffn",),
    ),
    Family(
        "falcon (parallel)",
        "falcon",
        COMMON | {"ffn_hidden_size": 48},
        attention="self_attention",
    ),
    Family(
        "falcon (ALiBi)",
        "falcon",
        COMMON | {"alibi": True, "parallel_attn": False, "multi_query": False},
        attention="self_attention",
    ),
    Family(
        "falcon (two norms)",
        "falcon",
        COMMON | {"new_decoder_architecture": True, "num_kv_heads": 2},
        attention="self_attention",
    ),
    Family(
        "falcon (one norm)",
        "falcon",
        COMMON
        | {
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
        },
        attention="self_attention",
    ),
    Family(
        "stablelm",
        "stablelm",
        COMMON
        | {
            "intermediate_size": 48,
            "num_key_value_heads": 2,
            "partial_rotary_factor": 0.5,
        },
    ),
    Family(
        "stablelm (parallel)",
        "stablelm",
        COMMON
        | {
            "intermediate_size": 48,
            "num_key_value_heads": 2,
            "use_parallel_residual": True,
        },
    ),
    _llama("olmo", clip_qkv=2.0),
    _llama("olmo2", **POST_NORMS),
    _llama("olmo3", **MIXED, **POST_NORMS),
    _llama("cohere", logit_scale=0.5, use_qk_norm=True),
    _llama("cohere2", logit_scale=0.5, **MIXED),
    _llama(
        "granite",
        residual_multiplier=0.7,
        attention_multiplier=0.3,
        embedding_multiplier=2.0,
        logits_scaling=2.0,
    ),
    _llama("starcoder2", **SLIDING),
    _llama("glm"),
    _llama("glm4", attention="post_self_attn_layernorm", mlp="post_mlp_layernorm"),
    _llama("exaone4", sliding_window_pattern=2, **MIXED, **POST_NORMS),
    _llama("nemotron"),
    Family("persimmon", "persimmon", COMMON | {"intermediate_size": 48}),
    Family("biogpt", "biogpt", COMMON | {"intermediate_size": 48}, mlp="fc2"),
    Family(
        "xglm",
        "xglm",
        TOKENS
        | {
            "d_model": 32,
            "num_layers": LAYERS,
            "attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 64,
        },
        mlp="fc2",
    ),
    _llama("helium"),
    _llama("ernie4_5"),
    _llama("hunyuan", "hunyuan_v1_dense"),
    _llama("seed_oss"),
    _llama("apertus"),
    _llama("arcee"),
    _llama("bitnet"),
    _llama("cwm", **MIXED),
    _llama("diffllama"),
    _llama("jais2"),
    _llama("nanochat"),
    _llama("hyperclovax", attention="post_norm1", mlp="post_norm2"),
    _llama("granite_swa", residual_multiplier=0.7, **MIXED),
    _llama(
        "modernbert-decoder",
        global_attn_every_n_layers=2,
        local_attention=WINDOW,
        attention="attn",
    ),
    Family(
        "minicpm3",
        "minicpm3",
        {k: v for k, v in MLA.items() if k not in ROUTED} | {"scale_depth": 1.4},
    ),
    Family("youtu", "youtu", {k: v for k, v in MLA.items() if k not in ROUTED}),
    # With experts
    _llama(
        "mixtral",
        num_local_experts=4,
        mlp="mlp" if TRANSFORMERS_5 else "block_sparse_moe",
        **SLIDING,
    ),
    _llama(
        "qwen2_moe",
        shared_expert_intermediate_size=16,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        **EXPERTS,
    ),
    _llama("qwen3_moe", mlp_only_layers=[1], **EXPERTS),
    _llama("olmoe", num_experts=4, num_experts_per_tok=2),
    _llama("flex_olmo", num_experts=4, num_experts_per_tok=2, **POST_NORMS),
    _llama(
        "granitemoe",
        num_local_experts=4,
        num_experts_per_tok=2,
        residual_multiplier=0.7,
        mlp="block_sparse_moe",
    ),
    _llama("gpt_oss", num_local_experts=4, num_experts_per_tok=2, **MIXED),
    _mla("deepseek_v2", topk_method="group_limited_greedy"),
    _mla("deepseek_v3"),
    _llama(
        "llama4",
        "llama4_text",
        intermediate_size_mlp=48,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        attention_chunk_size=WINDOW,
        layer_types=["chunked_attention", "full_attention"] * 2,
        no_rope_layers=[1, 0, 1, 0],
        mlp="feed_forward",
    ),
    _llama("glm4_moe", first_k_dense_replace=1, n_group=1, topk_group=1, **ROUTED),
    _mla("glm4_moe_lite"),
    _llama(
        "aria (text)",
        "aria_text",
        moe_num_experts=4,
        moe_topk=2,
        moe_num_shared_experts=1,
    ),
    _llama(
        "afmoe",
        num_dense_layers=1,
        global_attn_every_n_layers=2,
        sliding_window=WINDOW,
        attention="post_attention_layernorm",
        mlp="post_mlp_layernorm",
        **EXPERTS,
    ),
    _llama("cohere2_moe", **EXPERTS, **MIXED),
    _llama("param2moe", first_k_dense_replace=1, n_group=1, topk_group=1, **ROUTED),
    _llama("minicpm5_moe", n_group=1, topk_group=1, **ROUTED),
    _llama("dots1", first_k_dense_replace=1, n_group=1, topk_group=1, **ROUTED),
    _llama(
        "ernie4_5_moe",
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=16,
        moe_layer_start_index=1,
        moe_num_shared_experts=1,
    ),
    _llama(
        "exaone_moe",
        first_k_dense_replace=1,
        num_shared_experts=1,
        n_group=1,
        topk_group=1,
        **EXPERTS,
        **MIXED,
    ),
    _llama("hunyuan (MoE)", "hunyuan_v1_moe", num_experts=4, moe_topk=2),
    _llama("minimax_m2", num_local_experts=4, num_experts_per_tok=2),
    _llama(
        "phimoe",
        num_local_experts=4,
        num_experts_per_tok=2,
        mlp="mlp" if TRANSFORMERS_5 else "block_sparse_moe",
    ),
    _llama(
        "jetmoe",
        num_local_experts=4,
        num_experts_per_tok=2,
        kv_channels=8,
        attention="self_attention",
    ),
    _llama(
        "granitemoeshared",
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=16,
        residual_multiplier=0.7,
        mlp="block_sparse_moe shared_mlp",
    ),
    _llama("mellum", **EXPERTS, **MIXED),
    _llama(
        "laguna",
        shared_expert_intermediate_size=16,
        num_attention_heads_per_layer=[4, 2, 4, 2],
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        **EXPERTS,
        **MIXED,
    ),
    _llama(
        "flint",
        shared_expert_intermediate_size=16,
        mlp_only_layers=[0],
        **EXPERTS,
        **MIXED,
    ),
    _llama(
        "hy_v3",
        num_experts=4,
        num_experts_per_tok=2,
        num_shared_experts=1,
        first_k_dense_replace=1,
        moe_intermediate_size=16,
    ),
    _mla("axk1"),
    _mla("axk2"),
    _llama("solar_open", **ROUTED),
    _llama("kolibri1", **EXPERTS),
    _llama(
        "minimax_m3 (text part)",
        "minimax_m3_vl_text",
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    _llama("mimo_v2_flash", **ROUTED),
    # The text parts of vision-language models
    _sees("llava", {"model_type": "llama"}, {"model_type": "clip_vision_model"}),
    _sees("qwen2_vl", MROPE, {"depth": 2, "embed_dim": 32, "num_heads": 4}),
    _sees("qwen2_5_vl", MROPE, {"depth": 2, "num_heads": 4, "out_hidden_size": 32}),
    _sees(
        "qwen3_vl",
        {
            ROPE_FIELD: {
                "rope_theta": 10000.0,
                "rope_type": "default",
                "mrope_section": [2, 1, 1],
            }
        },
        {
            "depth": 2,
            "num_heads": 4,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0],
        },
    ),
    _sees(
        "gemma3",
        {"query_pre_attn_scalar": 8} | MIXED,
        {"model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
    ),
    _sees("mistral3", {"model_type": "mistral"}, {"model_type": "pixtral"}),
    _sees("idefics3", {"model_type": "llama"}, {}),
    _sees(
        "internvl",
        {"model_type": "qwen2"},
        {"image_size": [8, 8], "patch_size": [4, 4]},
    ),
]


def family(name: str) -> Family:
    from hybrid_families import HYBRIDS  # both are made with what is here
    from plain_families import NORMED_AFTER, OTHERS

    return next(
        found
        for found in [*FAMILIES, *HYBRIDS, *OTHERS, *NORMED_AFTER]
        if found.name == name
    )


# --- representatives
# --------------------------------------------------------------------------------------

PROVED = {line["family"]: line for line in read() if line["line"] == LINE}


def structure(family: Family) -> Any:
    """What test_architectures proved of its layers, the kinds of attention among them,
    and whether a larger model holds them.

    A family of which nothing is kept, or which is refused, is like no other.
    """
    proved = PROVED.get(family.name, {"verdict": "unknown"})
    if proved["verdict"] != "exact":
        return family.name
    config = AutoConfig.for_model(family.model_type, **family.config).get_text_config()
    facts = {
        name: str(fact)
        for name, fact in proved.items()
        if name not in ("family", "line", "transformers")
    }
    return str(facts), str(getattr(config, "layer_types", None)), family.auto


def layout(family: Family) -> Any:
    """Of its structure what the files of a model show."""
    proved = PROVED.get(family.name, {})
    return str(
        [proved.get(name, family.name) for name in ("block", "alike", "sublayers")]
    )


def block(family: Family) -> Any:
    """How its sublayers follow one another, and how many layers each is made of."""
    proved = PROVED.get(family.name, {"block": family.name})
    lengths = [one.count(">") for one in proved.get("sublayers", ())]
    return str([proved.get("block"), proved.get("alike"), lengths])


@functools.cache
def representatives() -> list[Family]:
    """The first family of every structure; all of them where the run records what it
    finds.
    """
    existing = [family for family in FAMILIES if family.exists]
    first = {structure(family): family for family in reversed(existing)}
    return (
        existing
        if RECORDING
        else [family for family in existing if family in first.values()]
    )


def each_block(
    families: Sequence[Family], name: str = "family"
) -> pytest.MarkDecorator:
    """A test of each; of one whose kind of block another has, only with `make
    test-engines`.
    """
    first = {block(family): family for family in reversed(representatives())}
    chosen = representatives() if RECORDING else [*first.values()]
    return _each(families, chosen, name)


def _each(
    families: Sequence[Family], first: Sequence[Family], name: str = "family"
) -> pytest.MarkDecorator:
    parameters = [
        one if one in first else pytest.param(one, marks=pytest.mark.slow)
        for one in families
    ]
    return pytest.mark.parametrize(name, parameters, ids=str)


# --- the slow twin
# --------------------------------------------------------------------------------------


@contextmanager
def silenced(
    model: PreTrainedModel,
    family: Family,
    attention: tuple[int, ...],
    mlp: tuple[int, ...],
) -> Iterator[None]:
    """The same model, in which the sublayers named still run, but add nothing: plain
    hooks, no code of `notall`.
    """
    layers = stack_of(model)
    silent = [
        named
        for i in attention
        if i not in family.whole
        for named in modules_of(layers[i], family.attention)
    ]
    silent += [named for i in mlp for named in modules_of(layers[i], family.mlp)]
    handles = []
    try:
        for name, module in silent:
            hook = _give_back_residual if name in family.adds_itself else _give_zeros
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        for i in {*attention}.intersection(family.whole):
            handles.append(
                layers[i].register_forward_hook(_give_back_hidden, with_kwargs=True)
            )
        yield
    finally:
        for handle in handles:
            handle.remove()


def modules_of(layer: nn.Module, names: str) -> list[tuple[str, nn.Module]]:
    """With their names. Raises `KeyError` where a layer has none of the modules that
    are said to be in it.
    """
    held = dict(layer.named_modules())
    chosen = [
        next((name for name in either.split("|") if name in held), either)
        for either in names.split()
    ]
    return [(name, held[name]) for name in chosen]


def stack_of(model: PreTrainedModel) -> nn.ModuleList:
    config = model.config.get_text_config()
    depth = getattr(
        config, "num_layers", config.num_hidden_layers
    )  # LongCat's layers hold two each
    return next(
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth
    )


def _give_zeros(module: nn.Module, args: Any, kwargs: Any, answer: Any) -> Any:
    return _with_first(
        answer,
        torch.zeros_like(answer[0] if isinstance(answer, tuple | list) else answer),
    )


def _give_back_residual(module: nn.Module, args: Any, kwargs: Any, answer: Any) -> Any:
    return _with_first(answer, args[1])  # BLOOM and MPT: (hidden, residual, ...)


def _give_back_hidden(module: nn.Module, args: Any, kwargs: Any, answer: Any) -> Any:
    return _with_first(answer, args[0] if args else kwargs["hidden_states"])


def _with_first(answer: Any, first: torch.Tensor) -> Any:
    return (
        type(answer)((first, *answer[1:]))
        if isinstance(answer, tuple | list)
        else first
    )


def replayed_logits(
    replay: Any, **inputs: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """For each plan of a `Replay`, as its `hidden_states` come: its number and its
    logits, by the model's own head.
    """
    from api import handing, record

    for numbers, hidden in replay.hidden_states(record(replay.model, **inputs)):
        with handing(replay.model, replay.structure, hidden):
            logits = replay.model(**inputs, use_cache=False).logits
        for number in numbers:
            yield number, logits
