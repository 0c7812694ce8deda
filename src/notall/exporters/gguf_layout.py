"""Where llama.cpp's converter puts each parameter of a model, and in which order its
numbers are there.

Source: llama.cpp, `conversion/` (before: convert_hf_to_gguf.py). Names of parameters
are those of both lines of transformers, whose experts differ: a module each, or one
tensor of all.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

from ..errors import UsageError
from ..models.gguf_file import BLOCK, EMBEDDING, GGUF, HEAD

Values = np.ndarray[Any, Any]
Parts = dict[str, Values]  # by the names of tensors in a block

FIX = "export the plan to hf, and convert that with llama.cpp's convert_hf_to_gguf.py"

# llama.cpp rotates neighbours of a head, and transformers its halves.
ROTATES_NEIGHBOURS = {
    "arcee", "arctic", "chameleon", "deci", "deepseek", "granite", "granitehybrid",
    "granitemoe", "llama", "minicpm", "mistral3", "nemotron_h", "nemotron_h_moe",
    "olmo", "smollm3",
}  # fmt: skip
# transformers has gain - 1 of these norms, and llama.cpp the gain.
ADDS_ONE = {"gemma", "gemma2", "gemma3", "nemotron", "qwen3next", "qwen35", "qwen35moe"}
# Matrices are (inputs, outputs) in transformers.
TRANSPOSED = {
    "gpt2": ("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    "jais": ("attn_qkv", "attn_output", "ffn_up", "ffn_gate", "ffn_down"),
}
# Parts of which the converter makes others by what the file does not hold.
UNSUPPORTED = {
    "bitnet": ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    "chameleon": ("attn_q_norm", "attn_k_norm"),
    "falcon-h1": (
        "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_down", "ssm_in",
        "ssm_out", "token_embd", "output",
    ),
    "gptj": ("attn_q", "attn_k"),
    "jais": ("token_embd", "output"),
    "plamo": ("attn_q", "attn_output"),
    "xverse": ("attn_q", "attn_k"),
}  # fmt: skip
# Stored as (width, kernel) or (groups, width); in transformers with a dimension more,
# or less.
RESHAPED = ("ssm_a", "ssm_d", "ssm_norm", "ssm_conv1d", "shortconv.conv", "exp_probs_b")

# Spellings of transformers' modules that gguf's own table lacks.
RENAMED = (
    (r"\b(language|text)_model\.", ""),
    (
        r"^transformer\.(?=h\.\d+\.post_attention_layernorm|word_embeddings_layernorm)",
        "",
    ),
    (r"^model(?=\.layers\.\d+\.mixer\.)", "backbone"),
    (r"\.dt_bias$", ".dt_proj.bias"),
    (r"e_score_correction_bias$", "e_score_correction.bias"),
    (r"gate\.moe_statics\.", "moe_statics."),
    (r"block_sparse_moe\.router\.weight$", "block_sparse_moe.router.layer.weight"),
)
# Of a block, by the end of the parameter's name.
IN_BLOCK = {
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.down_proj": "ffn_down_exps.weight",
    "experts.up_proj": "ffn_up_exps.weight",
    "experts.down_proj_bias": "ffn_down_exps.bias",
    "block_sparse_moe.output_linear.weight": "ffn_down_exps.weight",
    "experts.mlp.w1": "ffn_gate_exps.weight",
    "experts.mlp.v1": "ffn_up_exps.weight",
    "experts.mlp.w2": "ffn_down_exps.weight",
    "shared_mlp.output_linear.weight": (
        "ffn_down.weight"
    ),  # where there are no experts to share with
}
EXPERT = re.compile(r"experts\.(\d+)\.(\w+)\.weight$")
ROLES = {"w1": "gate", "w3": "up", "w2": "down"} | {
    f"{one}_proj": one for one in ("gate", "up", "down")
}
HEAD_NORM = re.compile(r"([qk])_layernorm\.norms\.(\d+)\.weight$")
SETTING = re.compile(r"\.mlp\.act_fn\.(alpha_n|alpha_p)$")


@dataclass(frozen=True)
class TensorPart:
    """Numbers of one tensor of the file: all of them, or those of the expert or head
    `part`.
    """

    tensor: str
    values: Values
    part: int | None = None


def places(source: GGUF, path: str, values: Values) -> list[TensorPart]:
    """Where the values of the parameter at `path` go. Raises `UsageError` where
    `source` has none.
    """
    name = _spelled(path)
    number = re.search(r"\.(\d+)\.", name)
    block = f"{BLOCK}{number[1]}." if number else ""
    if expert := EXPERT.search(name):
        role = ROLES.get(expert[2])
        return [
            turned(
                source,
                TensorPart(f"{block}ffn_{role}_exps.weight", values, int(expert[1])),
            )
        ]
    if head := HEAD_NORM.search(name):
        return [TensorPart(f"{block}attn_{head[1]}_norm.weight", values, int(head[2]))]
    found = [
        one
        for one in (_mapped(source, name), _in_block(block, name))
        if one in source.tensors
    ]
    if found:
        return [turned(source, TensorPart(found[0], values))]
    for ending, split in SPLIT.items():
        if name.endswith(ending):
            parts = split(source, block, values)
            return [
                turned(source, TensorPart(f"{block}{one}", some))
                for one, some in parts.items()
            ]
    raise UsageError(
        f"{source.path.name} has no tensor for {path}, which the plan has weights for;"
        " repair it"
    )


def setting_of(path: str) -> tuple[str, int] | None:
    """The list of the header that a parameter is in, and its place there; None for one
    with a tensor.
    """
    number = re.search(r"\.(\d+)\.", path)
    found = SETTING.search(path)
    return (f"xielu.{found[1]}", int(number[1])) if found and number else None


def _spelled(path: str) -> str:
    for pattern, other in RENAMED:
        path = re.sub(pattern, other, path)
    return path


def _mapped(source: GGUF, name: str) -> str:
    """The tensor by gguf's own table; of a parameter that is named like no other, with
    one of two endings.
    """
    architectures = {known: number for number, known in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(architectures[source.architecture], source.depth)
    if found := names.get_name(name, (".weight", ".bias")):
        endings = [
            one for one in ("", ".weight", ".bias") if f"{found}{one}" in source.tensors
        ]
        tensor = f"{found}{endings[0]}" if endings else found
        is_tied = tensor == HEAD and HEAD not in source.tensors
        return EMBEDDING if is_tied else tensor
    return ""


def _in_block(block: str, name: str) -> str:
    return next(
        (
            block + tensor
            for ending, tensor in IN_BLOCK.items()
            if name.endswith(ending)
        ),
        "",
    )


# --- one parameter that is several tensors
# ----------------------------------------------------------


def _gate_and_up(gate: str, up: str) -> Callable[[GGUF, str, Values], Parts]:
    def split(source: GGUF, _: str, values: Values) -> Parts:
        """(..., 2 x width, hidden), the gate's rows before the others, into two of
        (..., width, hidden).
        """
        if source.architecture in ("gpt-oss", "llama4") and values.ndim == 3:
            values = values.swapaxes(-1, -2)  # from (experts, hidden, 2 x width)
        axis = -1 if gate.endswith(".bias") else -2
        rows = np.moveaxis(values, axis, 0)
        half = len(rows) // 2
        both = (
            (rows[::2], rows[1::2])
            if source.architecture == "gpt-oss"
            else (rows[:half], rows[half:])
        )
        return {name: np.moveaxis(one, 0, axis) for name, one in zip((gate, up), both)}

    return split


def _shared(source: GGUF, block: str, values: Values) -> Parts:
    """The gate and the rest of Granite's shared expert, or of its MLP where it has no
    experts.
    """
    ending = "_shexp" if f"{block}ffn_gate_shexp.weight" in source.tensors else ""
    return _gate_and_up(f"ffn_gate{ending}.weight", f"ffn_up{ending}.weight")(
        source, block, values
    )


def _latent(source: GGUF, block: str, values: Values) -> Parts:
    """(heads x (keys + values), rank) into keys, (heads, rank, keys), and values,
    (heads, values, rank).
    """
    keys = source.tensors.get(f"{block}attn_k_b.weight")
    if keys is None:
        return {}
    heads, rank, size = keys.shape
    both = values.reshape(heads, -1, rank)
    return {
        "attn_k_b.weight": both[:, :size].swapaxes(1, 2),
        "attn_v_b.weight": both[:, size:],
    }


def _with_gate(source: GGUF, _: str, values: Values) -> Parts:
    """Qwen3-Next's (key heads x (q, k, v, z), hidden) into all q, k, v, a kind after
    the other, and z.
    """
    heads, size = source.count("ssm.group_count"), source.count("ssm.state_size")
    grouped = values.reshape(heads, -1, values.shape[-1])
    wide = (
        grouped.shape[1] - 2 * size
    ) // 2  # rows of values and of their gate, of a key head
    ends = [size, 2 * size, 2 * size + wide]
    q, k, v, z = (
        one.reshape(-1, values.shape[-1]) for one in np.split(grouped, ends, axis=1)
    )
    return {"attn_qkv.weight": np.concatenate([q, k, v]), "attn_gate.weight": z}


SPLIT = {
    "experts.gate_up_proj": _gate_and_up("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "experts.gate_up_proj_bias": _gate_and_up("ffn_gate_exps.bias", "ffn_up_exps.bias"),
    "block_sparse_moe.input_linear.weight": _gate_and_up(
        "ffn_gate_exps.weight", "ffn_up_exps.weight"
    ),
    "shared_mlp.input_linear.weight": _shared,
    "kv_b_proj.weight": _latent,
    "in_proj_qkvz.weight": _with_gate,
}


# --- the order of numbers in one tensor
# --------------------------------------------------------------------------------------


def turned(source: GGUF, place: TensorPart) -> TensorPart:
    """With its values in the order that llama.cpp has them in. Raises `UsageError`
    where that is not known.
    """
    part, architecture = _part_of(place.tensor), source.architecture
    if part in UNSUPPORTED.get(architecture, ()):
        problem = (
            f"notall does not know how llama.cpp's converter writes {part} of"
            f" {architecture}"
        )
        raise UsageError(f"{problem}, which the plan has weights for; {FIX}")
    values = place.values
    for rule in (_rotated, _raised, _transposed, _fused, _recurrent, _of_experts):
        values = rule(source, place.tensor, values)
    stored = source.tensors.get(place.tensor)
    if stored is not None and part in RESHAPED and values.size == np.prod(stored.shape):
        values = values.reshape(stored.shape)
    return TensorPart(place.tensor, values, place.part)


def _part_of(tensor: str) -> str:
    """Such as attn_q, of blk.3.attn_q.weight."""
    return re.sub(rf"^{BLOCK}\d+\.|\.(weight|bias|scale)$", "", tensor)


def _heads(source: GGUF, tensor: str, setting: str) -> int:
    found = source.setting(setting)
    return (
        int(found[int(tensor.split(".")[1])]) if isinstance(found, list) else int(found)
    )


def _rotated(source: GGUF, tensor: str, values: Values) -> Values:
    settings = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
    setting = settings.get(_part_of(tensor))
    if setting is None or source.architecture not in ROTATES_NEIGHBOURS:
        return values
    return halves_paired(values, _heads(source, tensor, setting))


def halves_paired(values: Values, heads: int) -> Values:
    """(heads x size, ...): row i of the first half of each head before row i of its
    second.
    """
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _raised(source: GGUF, tensor: str, values: Values) -> Values:
    is_norm = tensor.endswith("_norm.weight") and _part_of(tensor) != "ssm_norm"
    return values + 1 if is_norm and source.architecture in ADDS_ONE else values


def _transposed(source: GGUF, tensor: str, values: Values) -> Values:
    is_turned = (
        _part_of(tensor) in TRANSPOSED.get(source.architecture, ()) and values.ndim == 2
    )
    return values.T if is_turned else values


def _fused(source: GGUF, tensor: str, values: Values) -> Values:
    """Queries, keys and values, head by head in transformers, a kind after the other in
    llama.cpp.
    """
    if _part_of(tensor) != "attn_qkv" or source.architecture not in (
        "bloom",
        "gptneox",
        "falcon",
    ):
        return values
    heads = _heads(source, tensor, "attention.head_count")
    groups = (
        _heads(source, tensor, "attention.head_count_kv")
        if source.architecture == "falcon"
        else heads
    )
    queries = heads // groups  # of a head of keys
    grouped = values.reshape(groups, queries + 2, -1, *values.shape[1:])
    kinds = np.split(grouped, [queries, queries + 1], axis=1)
    return np.concatenate([kind.reshape(-1, *values.shape[1:]) for kind in kinds])


def _recurrent(source: GGUF, tensor: str, values: Values) -> Values:
    part = _part_of(tensor)
    if part == "ssm_a":
        values = -np.exp(values)
    if source.architecture in ("qwen35", "qwen35moe"):
        values = _tiled(source, part, values)
    return values


def _tiled(source: GGUF, part: str, values: Values) -> Values:
    """The heads of values of Qwen3.5's linear attention: by heads of keys, and in
    llama.cpp in turn.
    """
    keys, heads = source.count("ssm.group_count"), source.count("ssm.time_step_rank")
    size = source.count("ssm.inner_size") // heads
    first = (
        2 * keys * source.count("ssm.state_size")
    )  # rows of queries and keys, before those of values
    rows = {
        "attn_qkv": (first, size),
        "ssm_conv1d": (first, size),
        "attn_gate": (0, size),
    }
    rows |= dict.fromkeys(("ssm_alpha", "ssm_beta", "ssm_a", "ssm_dt"), (0, 1))
    if part == "ssm_out":
        return np.ascontiguousarray(_in_turn(values.T, keys, heads, size).T)
    if part not in rows:
        return values
    start, width = rows[part]
    return np.concatenate(
        [values[:start], _in_turn(values[start:], keys, heads, width)]
    )


def _in_turn(values: Values, keys: int, heads: int, size: int) -> Values:
    """(keys x heads of each x size, ...) with the first heads of all before the second
    of all.
    """
    grouped = values.reshape(keys, heads // keys, size, *values.shape[1:])
    return grouped.swapaxes(0, 1).reshape(values.shape)


def _of_experts(source: GGUF, tensor: str, values: Values) -> Values:
    """(experts, outputs, inputs) of tensors that transformers has otherwise."""
    part, stored = _part_of(tensor), source.tensors.get(tensor)
    if not part.endswith("_exps") or stored is None:
        return values
    if source.architecture == "dbrx":  # (experts x width, hidden) of all three
        wide = values.reshape(stored.shape[0], -1, values.shape[-1])
        return wide.swapaxes(1, 2) if part == "ffn_down_exps" else wide
    is_turned = source.architecture in ("gpt-oss", "llama4") and part == "ffn_down_exps"
    return values.swapaxes(1, 2) if is_turned and values.ndim == 3 else values
