"""A tiny Llama as a GGUF file, written tensor by tensor, as llama.cpp's converter
would.
"""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Kind, GGUFWriter, TokenType
from gguf.quants import quantize
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import PreTrainedModel

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LETTERS = sorted(ByteLevel.alphabet())
MERGES = ["Ġ t", "h e", "Ġt he", "Ġ Ġ", "Ċ Ċ"]
WORDS = [*SPECIAL, *LETTERS, *(merge.replace(" ", "") for merge in MERGES)]

# What a layer's tensors are called in GGUF, and in transformers.
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    *,
    without: str = "",
    kind: Kind = Kind.F32,
    licence: str = "",
) -> Path:
    """Write a Llama or Qwen2 whose vocabulary is `WORDS`, its blocks' matrices in a
    type that `packed` knows.

    `without` names a tensor to leave out.
    """
    config, writer = model.config, GGUFWriter(path, model.config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(WORDS))
    add_tokenizer(writer)
    if licence:
        writer.add_license(licence)
    for name, tensor in _tensors(model).items():
        if name != without:
            values = np.ascontiguousarray(tensor.detach().numpy())
            own = kind if name.startswith("blk.") and values.ndim > 1 else Kind.F32
            writer.add_tensor(name, packed(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def packed(values: np.ndarray, kind: Kind) -> np.ndarray:
    """As `quantize` does, and for Q4_K, which that does not write, with one scale for
    all 256 values of a block.
    """
    if kind != Kind.Q4_K:
        return quantize(values, kind)
    blocks = values.reshape(-1, 256)
    least = np.minimum(blocks.min(1, keepdims=True), 0)
    step = (blocks.max(1, keepdims=True) - least) / 15
    nibbles = np.rint((blocks - least) / step).astype(np.uint8).reshape(-1, 4, 2, 32)
    ones = np.tile(
        np.array([1] * 8 + [0x11] * 4, np.uint8), (len(blocks), 1)
    )  # eight scales and minima, 6 bits each
    pieces = [np.hstack([step, -least]).astype(np.float16).view(np.uint8), ones]
    pieces.append((nibbles[:, :, 0] | nibbles[:, :, 1] << 4).reshape(-1, 128))
    return np.hstack(pieces).reshape(len(values), -1)


def add_tokenizer(writer: GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types(
        [TokenType.CONTROL if word in SPECIAL else TokenType.NORMAL for word in WORDS]
    )
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    config, base = model.config, model.model
    tensors = {
        "token_embd.weight": base.embed_tokens.weight,
        "output_norm.weight": base.norm.weight,
        "output.weight": model.lm_head.weight,
    }
    for index, layer in enumerate(base.layers):
        for name, path in NAMES.items():
            for kind, weight in layer.get_submodule(path).named_parameters():
                tensors[f"blk.{index}.{name}.{kind}"] = weight
        if config.model_type != "llama":
            continue
        for name, heads in (
            ("attn_q", config.num_attention_heads),
            ("attn_k", config.num_key_value_heads),
        ):
            rotated = f"blk.{index}.{name}.weight"
            tensors[rotated] = _interleaved(tensors[rotated], heads)
    return tensors


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp rotates neighbouring channels of a Llama, transformers the two halves
    of a head.
    """
    rows, columns = weight.shape
    return (
        weight.view(heads, 2, rows // heads // 2, columns)
        .transpose(1, 2)
        .reshape(rows, columns)
    )
