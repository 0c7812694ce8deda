"""The GGUF of the original model without some of its sublayers: fields and tensors.

Blocks of one attention and one MLP each stay in an ordinary file; a plan that leaves
others makes a `deci` file (`gguf_deci`), and one that skips in the prompt alone keeps
all of the original's (`gguf_prompts`).
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind, GGUFValueType

from ..errors import UsageError
from ..models.gguf_file import (
    BLOCK,
    GGUF,
    Field,
    Fields,
    GGUFTensor,
    GGUFTensors,
    refuse_kv_only,
)
from ..plan import FOR_THIS_MODEL, Fingerprint, Plan, several
from ..running.regrouping import BOTH, Folded, Layer, folded, regroup
from .gguf_deci import deci
from .gguf_prompts import with_prompt_skips

# Their blocks hold one attention and one MLP each.
ORDINARY = {
    "apertus", "arcee", "arctic", "baichuan", "bailingmoe", "bailingmoe2", "bitnet",
    "bloom", "chameleon", "chatglm", "codeshell", "cohere2", "command-r", "dbrx",
    "deci", "deepseek", "deepseek2", "dots1", "ernie4_5", "ernie4_5-moe", "exaone",
    "exaone4", "falcon", "gemma", "gemma2", "gemma3", "gemma4", "glm4", "glm4moe",
    "gpt-oss", "gpt2", "gptj", "gptneox", "granite", "granitemoe", "grok",
    "hunyuan-dense", "hunyuan-moe", "internlm2", "jais", "llama", "llama4", "maincoder",
    "minicpm", "minicpm3", "mistral3", "mpt", "nemotron", "olmo", "olmo2", "olmoe",
    "openelm", "orion", "pangu-embedded", "phi2", "phi3", "phimoe", "plamo", "plm",
    "qwen", "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen3moe", "refact", "seed_oss",
    "smollm3", "stablelm", "starcoder", "starcoder2", "xverse"
}  # fmt: skip

# Some of their layers hold a recurrent mixer, or one sublayer alone; lists of the file,
# or their tensors, say which.
HYBRIDS = {
    "falcon-h1", "granitehybrid", "jamba", "lfm2", "lfm2moe", "mamba", "mamba2",
    "nemotron_h", "nemotron_h_moe", "qwen35", "qwen35moe", "qwen3next",
}  # fmt: skip
# Every n-th mixer is an attention, unless the file lists the others; llama.cpp reads
# such a list of the architectures in LISTING alone.
INTERVAL, LISTED = "full_attention_interval", "attention.recurrent_layers"
INTERVALS = {"qwen35": 4, "qwen35moe": 4, "qwen3next": 4}
LISTING = {"qwen35", "qwen35moe"}

# Every n-th layer has full attention and the others a window, unless the file lists
# them.
WINDOWS = {
    "gemma2": 2,
    "gemma3": 6,
    "cohere2": 4,
    "gpt-oss": 2,
    "exaone4": 4,
    "olmo2": 4,
    "llama4": 4,
}
# Every n-th attention goes without RoPE, and no setting says so.
WITHOUT_ROPE = {"smollm3": 4, "llama4": 4}
OUTPUT_SCALE = "layer_output_scale.weight"
PATTERN = "attention.sliding_window_pattern"
# llama.cpp computes these in another way at one depth than at all others.
SPECIAL_DEPTHS = {"gemma2": 46, "gemma3": 62, "baichuan": 32}
NORMS_BEFORE_MLP = ("ffn_norm.", "post_attention_norm.", "post_ffw_norm.")
# A list of settings by layer is about the MLPs where its name has one of these words.
OF_MLPS = ("feed_forward", "expert", "xielu", "swiglu")


def cut(source: GGUF, plan: Plan) -> tuple[Fields, GGUFTensors]:
    """Fields and tensors of the file without the sublayers that `plan` skips.

    Raises `UsageError` for a damaged file, a plan of another model, an architecture
    whose layers notall doesn't know, and a plan that no GGUF file can express.
    """
    _check(source, plan)
    if plan.prefill:
        return with_prompt_skips(source, plan)
    kinds = [_kinds(source, index) for index in range(source.depth)]

    def can_stand_in(attention: int, mlp: int) -> bool:
        return _mlp_fits(source, attention, mlp)

    layers = regroup(kinds, plan, can_stand_in)
    if all(layer.is_ordinary for layer in layers):
        return _ordinary(source, layers)
    return deci(source, layers)


def _mlp_fits(source: GGUF, attention: int, mlp: int) -> bool:
    """Whether the MLP of block `mlp` can stand in block `attention`: it runs after the
    attention there, and has the same tensors.
    """
    if source.architecture in ("arctic", "gptneox") and source.setting(
        "use_parallel_residual", True
    ):
        return False
    has_norm = any(
        name.startswith(NORMS_BEFORE_MLP) for name in source.block(attention)
    )
    return has_norm and source.mlp(attention).keys() == source.mlp(mlp).keys()


def _check(source: GGUF, plan: Plan) -> None:
    _check_depth(source, plan)
    plan.check_depth(source.depth)
    refuse_kv_only(source.path, source.fields)
    name = source.architecture
    if name not in ORDINARY | HYBRIDS:
        raise UsageError(
            f"notall does not know how llama.cpp builds the layers of {name}, and"
            " leaves it alone"
        )
    if source.setting("nextn_predict_layers", 0):
        raise UsageError(
            f"{source.path.name} holds layers that predict ahead, after its last;"
            " convert it without them"
        )
    for kind in BOTH:
        for index in getattr(plan, kind):
            if kind not in _kinds(source, index):
                raise UsageError(
                    f"the plan skips the {kind} of layer {index}, which has none in"
                    f" {source.path.name}"
                )


def _check_depth(source: GGUF, plan: Plan) -> None:
    """The blocks of the file are those that it says it has, and that the plan is of."""
    numbers = set[int]()
    for name in source.tensors:
        if match := re.match(r"blk\.(\d+)\.", name):
            numbers.add(int(match[1]))
    if numbers != set(range(source.depth)):
        raise UsageError(
            f"{source.path.name} has {several(len(numbers), 'block')}, and says"
            f" {source.depth}; download it again"
        )
    shape = Fingerprint.parse(plan.fingerprint)
    depth, width = source.depth, source.count("embedding_length")
    if shape and (shape.layers, shape.hidden_size) != (depth, width):
        raise UsageError(
            f"this plan was made for {plan.fingerprint}, but {source.path.name} is"
            f" {depth}x{width}; {FOR_THIS_MODEL}"
        )


def _kinds(source: GGUF, index: int) -> Sequence[str]:
    """The kinds of sublayers of a block: "attention" (any mixer) and "mlp"."""
    if source.architecture not in HYBRIDS:
        return BOTH
    names = [
        name for name in source.block(index) if not name.split(".")[0].endswith("_norm")
    ]
    is_mlp = [name.startswith("ffn_") for name in names]
    return [kind for kind in BOTH if (kind == "mlp") in is_mlp]


def _ordinary(source: GGUF, layers: Sequence[Layer]) -> tuple[Fields, GGUFTensors]:
    """A file of the same architecture, with blocks of one attention and one MLP."""
    attentions = [layer.attention for layer in layers]
    mlps = [layer.mlp for layer in layers if layer.mlp is not None]
    _check_rules_by_index(source, attentions, mlps)
    tensors = source.outside_blocks
    scales = [_output_scale(source, index) for index in range(source.depth)]
    is_scaled = any(scale != 1 for scale in scales)
    rows = zip(attentions, mlps, folded(layers, scales))
    for number, (attention, mlp, scale) in enumerate(rows):
        parts = source.attention(attention) | source.mlp(mlp)
        if is_scaled:
            parts |= _scaled(source, parts, scale)
        tensors |= {f"{BLOCK}{number}.{name}": tensor for name, tensor in parts.items()}
    return _ordinary_fields(source, attentions, mlps), tensors


def _ordinary_fields(
    source: GGUF, attentions: Sequence[int], mlps: Sequence[int]
) -> Fields:
    """The fields of a file whose block n has these attentions and MLPs of the source.

    A value per layer follows the sublayer that it is about.
    """
    start = f"{source.architecture}."
    fields = dict(source.fields)
    for name, field in source.fields.items():
        is_per_layer = (
            isinstance(field.value, list) and len(field.value) == source.depth
        )
        if is_per_layer and name.startswith((start, "xielu.")):
            indices = mlps if any(word in name for word in OF_MLPS) else attentions
            fields[name] = Field([field.value[index] for index in indices], field.kind)
    fields[f"{start}block_count"] = Field.of(len(attentions))
    if dense_first := source.setting("leading_dense_block_count", 0):
        left = sum(index < dense_first for index in mlps)
        fields[f"{start}leading_dense_block_count"] = Field.of(left)
    for name, flags in _orders(source, attentions):
        fields[start + name] = Field(flags, GGUFValueType.BOOL)
    return fields


def _output_scale(source: GGUF, index: int) -> float:
    """What a layer multiplies its stream by in the end, as Gemma 4's do."""
    stored = source.block(index).get(OUTPUT_SCALE)
    scale = 1.0 if stored is None else float(_floats(source, OUTPUT_SCALE, stored)[0])
    if not 0 < abs(scale) < math.inf:
        raise UsageError(
            f"{source.path.name} has {scale} for {OUTPUT_SCALE} of block {index};"
            " download it again"
        )
    return scale


def _scaled(source: GGUF, parts: GGUFTensors, scale: Folded) -> GGUFTensors:
    """What changes in a block of a model with a scale per layer, where layers were cut.

    The norm behind each late sublayer is divided by the scales that are gone; the
    block's own scale becomes the product.
    """
    divisors = {
        "post_attention_norm.weight": scale.attention,
        "post_ffw_norm.weight": scale.mlp,
    }
    new = {
        name: _floats(source, name, parts[name]) / divisor
        for name, divisor in divisors.items()
        if divisor != 1
    }
    if OUTPUT_SCALE in parts:
        stored = _floats(source, OUTPUT_SCALE, parts[OUTPUT_SCALE])
        new[OUTPUT_SCALE] = np.full_like(stored, scale.whole)
    return {
        name: GGUFTensor(np.float32(values), Kind.F32) for name, values in new.items()
    }


def _floats(source: GGUF, name: str, stored: GGUFTensor) -> np.ndarray[Any, Any]:
    """The numbers of a vector in float32, as llama.cpp's converter writes norms."""
    if stored.quantization != Kind.F32 or stored.data.ndim != 1 or not stored.data.size:
        raise UsageError(
            f"{source.path.name} has {name} in another form than llama.cpp's converter;"
            " download it again"
        )
    return stored.data


def _check_rules_by_index(
    source: GGUF, attentions: Sequence[int], mlps: Sequence[int]
) -> None:
    """Refuse what would give a layer another rule by its new number."""
    name = source.architecture
    shared = ("attention.shared_kv_layers", "embedding_length_per_layer_input")
    if any(source.setting(key, 0) for key in shared):
        raise UsageError(
            f"layers of this {name} share keys and values, or each is given an input of"
            " its own, so that none can be cut out; skip in memory"
        )
    is_listed = name in LISTING or source.setting(LISTED, [])
    interval = 1 if is_listed else source.count(INTERVAL, INTERVALS.get(name, 1))
    experts = source.setting("interleave_moe_layer_step", 1) or 1
    rules = [
        ("full attentions", interval, attentions),
        ("attentions without RoPE", WITHOUT_ROPE.get(name, 1), attentions),
        ("MLPs with experts", experts, mlps),
    ]
    for what, period, indices in rules:
        if _ends_of_periods(range(len(indices)), period) != _ends_of_periods(
            indices, period
        ):
            raise UsageError(
                f"llama.cpp takes every {period}th layer of {name} for one of the"
                f" {what}, and this plan moves them; leave out whole runs of {period}"
                " blocks, or export to hf"
            )
    depths = source.depth, len(attentions)
    telling = SPECIAL_DEPTHS.get(name)
    if telling in depths and depths[0] != depths[1]:
        raise UsageError(
            f"llama.cpp computes a {name} of {telling} layers in another way than any"
            " other, so that one cannot become the other; export to hf"
        )


def _ends_of_periods(indices: Sequence[int], period: int) -> list[bool]:
    """For each layer, whether it is the last of a run of `period`."""
    return [index % period == period - 1 for index in indices]


def _orders(
    source: GGUF, attentions: Sequence[int]
) -> Iterator[tuple[str, list[bool]]]:
    """Flags by layer that the file doesn't have, because its architecture has a rule.

    True where a layer has a window, or a recurrent mixer.
    """
    name = source.architecture
    period = source.setting(PATTERN, WINDOWS.get(name, 1))
    has_windows = name in WINDOWS and source.setting("attention.sliding_window", 1)
    if has_windows and not isinstance(period, list):  # a list is cut with the others
        yield PATTERN, [not last for last in _ends_of_periods(attentions, period)]
    if name in LISTING and not source.setting(LISTED, []):
        period = source.count(INTERVAL, INTERVALS[name])
        flags = _ends_of_periods(attentions, period)
        if flags != _ends_of_periods(range(len(attentions)), period):
            yield LISTED, [not last for last in flags]
