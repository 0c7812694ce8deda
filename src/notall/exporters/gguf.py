"""llama.cpp: rewrite the GGUF of the dense model, whatever its quantisation. No weight is changed but repaired ones.

A portable plan leaves an ordinary file of the same architecture. Other plans leave a `deci` file, whose layers may lack
a sublayer each, for the architectures that are built as `deci` is but for that. What llama.cpp decides by the index of
a layer, without a setting in the file, cannot be carried over, and is refused where it would change.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, quant_shape_to_byte_shape

from ..errors import UnknownArchitecture, UsageError
from ..models.cache import sha256
from ..progress import Progress, silent
from ..records.fingerprint import Fingerprint
from ..records.plan import Plan
from ..running.regrouping import BOTH, Folded, Layer, folded, merged, regroup, sparse_layers
from . import llamacpp
from .gguf_file import BLOCK, GGUF, Field, GGUFTensor, read_gguf, total_bytes, write_gguf
from .gguf_weights import with_weights
from .manifest import (
    TURNED_OFF,
    NotVerified,
    Origin,
    Verdict,
    Verified,
    WeightBytes,
    describe,
    manifest_of,
)
from .writing import check_room

# Their blocks hold one attention and one MLP each.
ORDINARY = {
    "apertus", "arcee", "arctic", "baichuan", "bailingmoe", "bailingmoe2", "bitnet", "bloom", "chameleon",
    "chatglm", "codeshell", "cohere2", "command-r", "dbrx", "deci", "deepseek", "deepseek2", "dots1", "ernie4_5",
    "ernie4_5-moe", "exaone", "exaone4", "falcon", "gemma", "gemma2", "gemma3", "gemma4", "glm4", "glm4moe", "gpt-oss",
    "gpt2", "gptj", "gptneox", "granite", "granitemoe", "grok", "hunyuan-dense", "hunyuan-moe", "internlm2", "jais",
    "llama", "llama4", "maincoder", "minicpm", "minicpm3", "mistral3", "mpt", "nemotron", "olmo", "olmo2", "olmoe",
    "openelm", "orion", "pangu-embedded", "phi2", "phi3", "phimoe", "plamo", "plm", "qwen", "qwen2", "qwen2moe",
    "qwen2vl", "qwen3", "qwen3moe", "refact", "seed_oss", "smollm3", "stablelm", "starcoder", "starcoder2", "xverse"
}  # fmt: skip

# Some of their layers hold a recurrent mixer, or one sublayer alone; lists of the file, or their tensors, say which.
HYBRIDS = {
    "falcon-h1", "granitehybrid", "jamba", "lfm2", "lfm2moe", "mamba", "mamba2", "nemotron_h", "nemotron_h_moe",
    "qwen35", "qwen35moe", "qwen3next",
}  # fmt: skip
# Every n-th mixer is an attention, unless the file lists the others, which llama.cpp reads of those alone.
INTERVAL, LISTED = "full_attention_interval", "attention.recurrent_layers"
INTERVALS = {"qwen35": 4, "qwen35moe": 4, "qwen3next": 4}
LISTING = {"qwen35", "qwen35moe"}

# Every n-th layer has full attention and the others a window, unless the file lists them.
WINDOWS = {"gemma2": 2, "gemma3": 6, "cohere2": 4, "gpt-oss": 2, "exaone4": 4, "olmo2": 4, "llama4": 4}
# Every n-th attention goes without RoPE, and no setting says so.
WITHOUT_ROPE = {"smollm3": 4, "llama4": 4}
# What makes layers of Gemma 4 depend on each other, or on their place.
BY_DEPTH = ("attention.shared_kv_layers", "embedding_length_per_layer_input")
OUTPUT_SCALE = "layer_output_scale.weight"
# Depths by which llama.cpp recognises a model that it then computes in another way.
TELLING_DEPTHS = {"gemma2": 46, "gemma3": 62, "baichuan": 32}
# The MLP of these reads what the attention read, though it has a norm of its own.
PARALLEL = ("arctic", "gptneox")

DECI = ("llama", "qwen2")  # architectures that `deci` computes
DECI_TENSORS = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
NARROW = 32  # the width of an MLP of zeros: llama.cpp's `deci` would drop an attention that has no MLP behind it


USE = (
    "llama.cpp, and what is built on it, run this file as they do the dense model's. Turn flash attention on "
    "(`-fa on`): without it, llama.cpp holds a cache for skipped attentions too."
)
TOLERANCE = 0.5  # nats; quantised products of llama.cpp on the dense default model are 0.2 from exact ones


def export_gguf(
    dense: Path,
    plan: Plan,
    folder: Path,
    *,
    measured: Mapping[str, Any] | None = None,
    check: bool = True,
    progress: Progress = silent,
) -> None:
    """Write the GGUF file, its manifest and its card into an empty folder; with `check`, read back and run it.

    Raises `UsageError` for a damaged file, a plan of another model, and a plan that no GGUF file can express.
    """
    source = read_gguf(dense)
    weights = getattr(plan, "weights", {})  # of a repaired plan, whose class would import torch
    repaired = with_weights(source, weights) if weights else source
    fields, tensors = cut(repaired, plan)
    check_room(folder, total_bytes(tensors))
    form = str(fields["general.architecture"].value)
    fingerprint = str(Fingerprint(source.architecture, source.depth, source.count("embedding_length")))
    origin = Origin(dense.name, f"sha256:{sha256(dense)}", source.depth, fingerprint, weights=dense.name)
    manifest = manifest_of(origin, plan, form)
    fields["notall.manifest"] = Field.of(json.dumps(manifest))
    written = folder / f"{dense.stem}-notall.gguf"
    write_gguf(written, source, fields, tensors, progress)
    verdict: Verdict = TURNED_OFF
    if check:
        progress(0, 1, "comparing with the skipped model")
        _check_copy(read_gguf(written), fields, tensors)
        verdict = _check_answers(dense, plan, written, len(source.tensors["token_embd.weight"].data))
    weights = WeightBytes(total_bytes(source.tensors), total_bytes(tensors))
    describe(folder, manifest, origin.card, USE, verdict=verdict, weights=weights, measured=measured)


def _check_copy(found: GGUF, fields: Mapping[str, Field], tensors: Mapping[str, GGUFTensor]) -> None:
    same = found.fields.keys() == fields.keys() and found.tensors.keys() == tensors.keys()
    if not same or any(not np.array_equal(found.tensors[name].data, tensors[name].data) for name in tensors):
        raise UsageError(f"{found.path.name} does not hold what was written to it; check the disk, and export again")


def _check_answers(dense: Path, plan: Plan, written: Path, vocabulary: int) -> Verdict:
    """Compare llama.cpp's most likely next tokens with those of the dense model that skips the plan in transformers."""
    if not llamacpp.is_installed():
        return NotVerified("llama.cpp is not installed (pip install 'notall[export]')")
    import torch

    from ..models.loading import load
    from ..running.skipping import skip

    tokens = torch.randint(vocabulary, (12,), generator=torch.Generator().manual_seed(0))
    try:
        found = llamacpp.next_token_logprobs(written, tokens.tolist())
        model, _ = load(dense, dtype="float32", device="cpu")
    except UnknownArchitecture as reason:
        return NotVerified(str(reason))
    with skip(model, plan), torch.inference_mode():
        expected = model(tokens[None]).logits[0, -1].log_softmax(-1)
    error = float((torch.tensor(list(found.values())) - expected[list(found)]).abs().max())
    if not error <= TOLERANCE:
        raise UsageError(
            f"llama.cpp answers differently from the skipped model, by {error:.2f} nats (at most {TOLERANCE} was "
            "expected), so nothing was written; please report the model and the plan"
        )
    return Verified(f"llama.cpp (xllamacpp {llamacpp.release()})", error, TOLERANCE, "nats of log-probability")


def cut(source: GGUF, plan: Plan) -> tuple[dict[str, Field], dict[str, GGUFTensor]]:
    """Fields and tensors of the file without what `plan` skips. Raises `UsageError` where no file can say so."""
    _check(source, plan)
    groups = regroup([_kinds(source, index) for index in range(source.depth)], plan)
    layers = merged(groups, lambda attention, mlp: _fits(source, attention, mlp))
    if all(layer.is_ordinary for layer in layers):
        return _ordinary(source, layers)
    return _deci(source, layers)


def _check(source: GGUF, plan: Plan) -> None:
    shape = Fingerprint.parse(plan.fingerprint)
    ours = (source.depth, source.count("embedding_length"))
    numbers = {int(match[1]) for name in source.tensors if (match := re.match(r"blk\.(\d+)\.", name))}
    if numbers != set(range(len(numbers))) or len(numbers) != source.depth:
        raise UsageError(
            f"{source.path.name} has tensors for {len(numbers)} blocks, and its header says {source.depth}; "
            "download it again"
        )
    if shape and (shape.layers, shape.hidden_size) != ours:
        raise UsageError(f"this plan was made for {plan.fingerprint}, but {source.path.name} is {ours[0]}x{ours[1]}")
    plan.check_depth(source.depth)
    name = source.architecture
    if name not in ORDINARY | HYBRIDS:
        raise UsageError(f"notall does not know how llama.cpp builds the layers of {name}, and leaves it alone")
    if source.setting("nextn_predict_layers", 0):
        raise UsageError(f"{source.path.name} holds layers that predict ahead, after its last; convert it without them")
    for kind in BOTH:
        lacking = [index for index in getattr(plan, kind) if kind not in _kinds(source, index)]
        if lacking:
            raise UsageError(f"the plan skips the {kind} of layer {lacking[0]}, which has none in {source.path.name}")


def _kinds(source: GGUF, index: int) -> Sequence[str]:
    """What a block holds: both, but for hybrids with layers of one sublayer."""
    if source.architecture not in HYBRIDS:
        return BOTH
    names = [name for name in source.block(index) if not name.split(".")[0].endswith("_norm")]
    has = {kind: any(name.startswith("ffn_") == (kind == "mlp") for name in names) for kind in BOTH}
    return [kind for kind in BOTH if has[kind]]


# --- ordinary files ---------------------------------------------------------------------------------------------------


def _ordinary(source: GGUF, layers: Sequence[Layer]) -> tuple[dict[str, Field], dict[str, GGUFTensor]]:
    attentions = [layer.attention for layer in layers]
    mlps = [layer.mlp for layer in layers if layer.mlp is not None]
    _check_rules_by_index(source, attentions, mlps)
    start = f"{source.architecture}."
    fields = dict(source.fields)
    for name, field in source.fields.items():
        if name.startswith(start) and isinstance(field.value, list) and len(field.value) == source.depth:
            by_mlp = any(word in name for word in ("feed_forward", "expert", "xielu", "swiglu"))
            fields[name] = Field([field.value[index] for index in (mlps if by_mlp else attentions)], field.kind)
    fields[f"{start}block_count"] = Field.of(len(layers))
    if lead := source.setting("leading_dense_block_count", 0):
        fields[f"{start}leading_dense_block_count"] = Field.of(sum(index < lead for index in mlps))
    if pattern := _window_pattern(source, attentions):
        fields[f"{start}attention.sliding_window_pattern"] = pattern
    if recurrent := _recurrent_layers(source, attentions):
        fields[f"{start}{LISTED}"] = recurrent
    tensors = source.outside_blocks
    scales = [_output_scale(source, index) for index in range(source.depth)]
    for number, (attention, mlp, by) in enumerate(zip(attentions, mlps, folded(layers, scales))):
        parts = _attention(source.block(attention)) | _mlp(source.block(mlp))
        if any(scale != 1 for scale in scales):
            parts |= _scaled(source, parts, by)
        tensors |= {f"{BLOCK}{number}.{name}": tensor for name, tensor in parts.items()}
    return fields, tensors


def _output_scale(source: GGUF, index: int) -> float:
    """What a layer multiplies its stream by in the end, as Gemma 4's do."""
    stored = source.block(index).get(OUTPUT_SCALE)
    scale = 1.0 if stored is None else float(_floats(source, OUTPUT_SCALE, stored)[0])
    if not 0 < abs(scale) < math.inf:
        raise UsageError(f"{source.path.name} has {scale} for {OUTPUT_SCALE} of block {index}; download it again")
    return scale


def _scaled(source: GGUF, parts: Mapping[str, GGUFTensor], by: Folded) -> dict[str, GGUFTensor]:
    """The number of a layer, and the norms behind what comes late for the numbers of those that were cut."""
    late = {"post_attention_norm.weight": by.attention, "post_ffw_norm.weight": by.mlp}
    new = {name: _floats(source, name, parts[name]) / scale for name, scale in late.items() if scale != 1}
    if OUTPUT_SCALE in parts:
        new[OUTPUT_SCALE] = np.full_like(_floats(source, OUTPUT_SCALE, parts[OUTPUT_SCALE]), by.whole)
    return {name: GGUFTensor(np.float32(values), GGMLQuantizationType.F32) for name, values in new.items()}


def _floats(source: GGUF, name: str, stored: GGUFTensor) -> np.ndarray[Any, Any]:
    if stored.quantization != GGMLQuantizationType.F32 or stored.data.ndim != 1 or not stored.data.size:
        raise UsageError(f"{source.path.name} has {name} in another form than llama.cpp's converter; download it again")
    return stored.data


def _check_rules_by_index(source: GGUF, attentions: Sequence[int], mlps: Sequence[int]) -> None:
    name = source.architecture
    if any(source.setting(given, 0) for given in BY_DEPTH):
        raise UsageError(
            f"layers of this {name} share keys and values, or each is given an input of its own, so that none can be "
            "cut out; skip in memory"
        )
    listed = name in LISTING or source.setting(LISTED, [])
    rules = [
        ("full attentions", 1 if listed else source.count(INTERVAL, INTERVALS.get(name, 1)), attentions),
        ("attentions without RoPE", WITHOUT_ROPE.get(name, 1), attentions),
        ("MLPs with experts", source.setting("interleave_moe_layer_step", 1) or 1, mlps),
    ]
    for what, period, indices in rules:
        if any(_is_last(number, period) != _is_last(index, period) for number, index in enumerate(indices)):
            raise UsageError(
                f"llama.cpp takes every {period}th layer of {name} for one of the {what}, and this plan moves them; "
                f"leave out whole runs of {period} blocks, or export to hf"
            )
    telling = TELLING_DEPTHS.get(name)
    if telling in (source.depth, len(attentions)) and source.depth != len(attentions):
        raise UsageError(
            f"llama.cpp computes a {name} of {telling} layers in another way than any other, so that one cannot become "
            "the other; export to hf"
        )


def _is_last(index: int, period: int) -> bool:
    return index % period == period - 1


def _window_pattern(source: GGUF, attentions: Sequence[int]) -> Field | None:
    """The list of layers with a window, where the file has none but the architecture has an order of them."""
    period = WINDOWS.get(source.architecture)
    if period is None or not source.setting("attention.sliding_window", 1):
        return None
    given = source.setting("attention.sliding_window_pattern", period)
    if isinstance(given, list):
        return None  # cut with the other lists
    return Field([not _is_last(index, given) for index in attentions], GGUFValueType.BOOL)


def _recurrent_layers(source: GGUF, attentions: Sequence[int]) -> Field | None:
    """The list of recurrent layers, where the file has none and they come in another order than the architecture's."""
    if source.architecture not in LISTING or source.setting(LISTED, []):
        return None
    period = source.count(INTERVAL, INTERVALS[source.architecture])
    recurrent = [not _is_last(index, period) for index in attentions]
    if recurrent == [not _is_last(number, period) for number in range(len(attentions))]:
        return None
    return Field(recurrent, GGUFValueType.BOOL)


def _attention(block: Mapping[str, GGUFTensor]) -> dict[str, GGUFTensor]:
    return {name: tensor for name, tensor in block.items() if not _is_mlp(name, block)}


def _mlp(block: Mapping[str, GGUFTensor]) -> dict[str, GGUFTensor]:
    return {name: tensor for name, tensor in block.items() if _is_mlp(name, block)}


def _is_mlp(name: str, block: Mapping[str, GGUFTensor]) -> bool:
    if name.startswith("post_attention_norm."):  # the norm after the attention, or the only one before the MLP
        return not any(other.startswith(("ffn_norm.", "post_ffw_norm.")) for other in block)
    return name.startswith(("ffn_", "pre_ffw_norm", "post_ffw_norm", "exp_probs_b", "layer_output_norm"))


def _fits(source: GGUF, attention: int, mlp: int) -> bool:
    """Whether the MLP of one block can stand in the place of another's: it runs after the attention, and is alike."""
    block, other = source.block(attention), source.block(mlp)
    sequential = source.architecture not in PARALLEL or not source.setting("use_parallel_residual", True)
    has_norm = any(name.startswith(("ffn_norm.", "post_attention_norm.", "post_ffw_norm.")) for name in block)
    alike = _mlp(block).keys() == _mlp(other).keys()
    return sequential and has_norm and alike


# --- deci -------------------------------------------------------------------------------------------------------------


def _deci(source: GGUF, layers: Sequence[Layer]) -> tuple[dict[str, Field], dict[str, GGUFTensor]]:
    _check_deci(source)
    _check_sizes(source)
    kept = list(sparse_layers(layers))
    heads, kv_heads = source.count("attention.head_count"), source.count("attention.head_count_kv")
    width, head_size = source.count("feed_forward_length"), _head_size(source)
    fields = _renamed(source)
    counts: dict[str, list[int]] = {
        "attention.head_count": [],
        "attention.head_count_kv": [],
        "feed_forward_length": [],
    }
    tensors = source.outside_blocks
    for number, row in enumerate(kept):
        parts: dict[str, GGUFTensor] = {}
        if row.attention is not None:
            parts |= _rotated(source, _attention(source.block(row.attention)), heads, kv_heads)
        elif number == 0:  # llama.cpp reads the size of heads only if layer 0 has some
            parts |= _silent_attention(source, head_size)
        parts |= _mlp(source.block(row.mlp)) if row.mlp is not None else _silent_mlp(source)
        tensors |= {f"{BLOCK}{number}.{name}": tensor for name, tensor in parts.items()}
        placeholder = int(number == 0)
        counts["attention.head_count"].append(heads if row.attention is not None else placeholder)
        counts["attention.head_count_kv"].append(kv_heads if row.attention is not None else placeholder)
        counts["feed_forward_length"].append(width if row.mlp is not None else NARROW)
    for name, values in counts.items():
        fields[f"deci.{name}"] = Field.of(values)
    sizes = dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), head_size)
    for name, value in (sizes | {"block_count": len(kept)}).items():
        fields[f"deci.{name}"] = Field.of(value)
    return fields, tensors


def _check_sizes(source: GGUF) -> None:
    """Raise `UsageError` unless the header gives the sizes that the tensors have: what is added is made by it."""
    sizes = {
        "attn_norm.weight": source.count("embedding_length"),
        "attn_q.weight": source.count("attention.head_count") * _head_size(source),
        "attn_k.weight": source.count("attention.head_count_kv") * _head_size(source),
        "ffn_up.weight": source.count("feed_forward_length"),
    }
    for index in range(source.depth):
        block = source.block(index)
        if any(name not in block or len(block[name].data) != size for name, size in sizes.items()):
            raise UsageError(
                f"the header of {source.path.name} and its tensors disagree in block {index}; download it again"
            )


def _check_deci(source: GGUF) -> None:
    name = source.architecture
    held = {tensor.split(".")[0] for index in range(source.depth) for tensor in source.block(index)}
    foreign = sorted(held - set(DECI_TENSORS))
    if name not in DECI:
        problem = f"llama.cpp has no layers with one sublayer for {name}"
    elif foreign:
        problem = f"llama.cpp's layers with one sublayer have no {foreign[0]}, which this {name} has"
    elif any(isinstance(source.setting(key), list) for key in ("attention.head_count", "feed_forward_length")):
        problem = "the layers of this file differ in size"
    elif source.setting("rope.dimension_count", _head_size(source)) != _head_size(source):
        problem = "llama.cpp's layers with one sublayer rotate whole heads, and this model rotates parts"
    else:
        return
    raise UsageError(
        f"{problem}, and this plan keeps sublayers that do not alternate; choose a portable plan, or export to hf"
    )


def _head_size(source: GGUF) -> int:
    """As llama.cpp has it: the width divided by the heads, unless the file says otherwise."""
    usual = source.count("embedding_length") // source.count("attention.head_count")
    return source.count("attention.key_length", usual)


def _renamed(source: GGUF) -> dict[str, Field]:
    start = f"{source.architecture}."
    fields = {
        f"deci.{name.removeprefix(start)}" if name.startswith(start) else name: field
        for name, field in source.fields.items()
    }
    return fields | {"general.architecture": Field.of("deci")}


def _rotated(source: GGUF, parts: dict[str, GGUFTensor], heads: int, kv_heads: int) -> dict[str, GGUFTensor]:
    """`deci` rotates neighbours, and qwen2 the halves of a head: bring the rows of queries and keys into that order."""
    if source.architecture == "llama":
        return parts
    counts = {"attn_q": heads, "attn_k": kv_heads}
    return {
        name: GGUFTensor(_interleaved(tensor.data, counts[name.split(".")[0]]), tensor.quantization)
        if name.split(".")[0] in counts
        else tensor
        for name, tensor in parts.items()
    }


def _interleaved(data: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """(heads x size, ...): of each head, row i of the first half is followed by row i of the second."""
    halves = data.reshape(heads, 2, -1, *data.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(data.shape)


def _silent_attention(source: GGUF, head_size: int) -> dict[str, GGUFTensor]:
    width = source.count("embedding_length")
    parts = {f"attn_{name}.weight": _zeros(head_size, width) for name in "qkv"}
    return parts | {"attn_output.weight": _zeros(width, head_size), "attn_norm.weight": _zeros(width)}


def _silent_mlp(source: GGUF) -> dict[str, GGUFTensor]:
    width = source.count("embedding_length")
    parts = {f"ffn_{name}.weight": _zeros(NARROW, width) for name in ("gate", "up")}
    return parts | {"ffn_down.weight": _zeros(width, NARROW), "ffn_norm.weight": _zeros(width)}


def _zeros(*shape: int) -> GGUFTensor:
    """In 8 bits where rows allow it: a block of zero bytes is a block of zeros."""
    if len(shape) > 1 and shape[-1] % 32 == 0:
        kind = GGMLQuantizationType.Q8_0
        return GGUFTensor(np.zeros(quant_shape_to_byte_shape(shape, kind), np.uint8), kind)
    return GGUFTensor(np.zeros(shape, np.float32), GGMLQuantizationType.F32)
