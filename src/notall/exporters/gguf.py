"""llama.cpp: rewrite the GGUF of the original model, whatever its quantisation.

Weights stay as they are, but for those of a repaired plan, and the norms behind a scale
per layer (Gemma 4's).

A portable plan leaves an ordinary file; others leave a `deci` file, whose layers may
lack a sublayer each. One that skips in the prompt alone leaves the original's file, and
in it what a patched llama.cpp needs.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from gguf import (
    GGMLQuantizationType as Kind,
    GGUFValueType,
    quant_shape_to_byte_shape,
)

from ..digests import digest_of_file
from ..engines.llamacpp import LlamaCpp, dense_gguf, next_token_logprobs
from ..errors import UnknownArchitecture, UsageError
from ..files import temporary
from ..models.gguf_file import (
    ARCHITECTURE,
    BLOCK,
    EMBEDDING,
    GGUF,
    Field,
    Fields,
    GGUFTensor,
    Tensors,
    read_gguf,
    refuse_kv_only,
    write_gguf,
)
from ..plan import FOR_THIS_MODEL, Fingerprint, Plan, several
from ..progress import Progress
from ..running.regrouping import BOTH, Folded, Layer, folded, regroup, sparse_layers
from . import Export, Source
from .gguf_layout import halves_paired
from .gguf_prompts import in_places, weights_in, with_prompt_skips
from .gguf_weights import with_weights
from .manifest import NotVerified, Origin, Verdict, Verified

if TYPE_CHECKING:
    from torch import Tensor

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
# Every n-th mixer is an attention, unless the file lists the others, which llama.cpp
# reads of those alone.
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
DECI = (
    "llama",
    "qwen2",
)  # architectures whose layers `deci`'s are, but that these may lack a sublayer each
DECI_TENSORS = (
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
)
# the width of an MLP of zeros: llama.cpp's `deci` would drop an attention that has no
# MLP behind it
NARROW = 32

USE = (
    "llama.cpp, and what is built on it, run this file as they do the original model's."
    " Turn flash attention on (`-fa on`): without it, llama.cpp holds a cache for"
    " skipped attentions too."
)
PATCH = "docs/upstream/llamacpp-prefill.patch"
PROMPT_USE = (
    "Prefill-only: a prompt's tokens but the last skip these sublayers, and their keys"
    " and values are written all the same; its last token and all that is generated run"
    " whole. This saves time to the first token, and neither memory nor cache nor time"
    " of decoding. It takes llama.cpp with the patch `llamacpp-prefill.patch` of"
    " notall's repository (`docs/upstream`). Any other llama.cpp refuses the file for"
    " the tensors of its repair; without a repair, it runs the file whole, as the"
    " original model."
)
# llama.cpp rounds what it multiplies with quantised matrices, in the dense file too.
# Differences up to these pass.
TIMES_DENSE, NATS = 3, 0.05
PROMPTS, LENGTH = 8, 12  # prompts that are compared, and the tokens of each
MOST_OFF = 2**-7  # of the largest number of a weight, by which 8 bits may round another


class GGUFExport(Export):
    """A GGUF file that llama.cpp runs, in the types of the original model's."""

    skips_prompts: ClassVar[bool] = True

    def __init__(self, dense: Path, plan: Plan) -> None:
        """Raises `UsageError` for a damaged file, a plan of another model, and one that
        no GGUF file can express.
        """
        self.dense, self.plan, self.name = dense, plan, f"{dense.stem}-notall.gguf"
        self.use = PROMPT_USE if plan.prefill else USE
        self.source = read_gguf(dense)
        weights = getattr(
            plan, "weights", {}
        )  # of a repaired plan, whose class would import torch
        self.whole = with_weights(self.source, weights) if weights else self.source
        self.fields, self.tensors = cut(self.whole, plan)
        self.form = str(self.fields[ARCHITECTURE].value)
        depth, width = self.source.depth, self.source.count("embedding_length")
        fingerprint = str(Fingerprint(self.source.architecture, depth, width))
        self.origin = Origin(
            dense.name,
            f"sha256:{digest_of_file(dense)}",
            depth,
            fingerprint,
            weights=dense.name,
        )
        self.dense_bytes, self.written_bytes = (
            sum(tensor.size for tensor in tensors.values())
            for tensors in (self.source.tensors, self.tensors)
        )
        self.fields["notall.manifest"] = Field.of(json.dumps(self.manifest))

    @classmethod
    @contextmanager
    def prepared(cls, source: Source, plan: Plan) -> "Iterator[GGUFExport]":
        if source.dtype:
            raise UsageError(
                "a GGUF export keeps the types of the original model's file: leave"
                " --dtype out"
            )
        yield cls(dense_gguf(source.model), plan)

    def write(self, folder: Path, shard_bytes: int, progress: Progress) -> None:
        write_gguf(folder / self.name, self.source, self.fields, self.tensors, progress)

    def verify(self, folder: Path) -> Verdict:
        """By llama.cpp's likeliest tokens: the mean difference of log-probabilities,
        compared with the original file's.

        Without llama.cpp the weights of a repaired plan are read back by transformers.
        """
        written = folder / self.name
        found = read_gguf(written)
        same = (found.fields, found.tensors.keys()) == (
            self.fields,
            self.tensors.keys(),
        )
        pairs = (
            (found.tensors[name].data, tensor.data)
            for name, tensor in self.tensors.items()
        )
        if not same or not all(np.array_equal(*pair) for pair in pairs):
            raise UsageError(
                f"{written.name} does not hold what was written to it; check the disk,"
                " and export again"
            )
        if self.plan.prefill:
            return NotVerified(
                f"only llama.cpp with {PATCH} runs it{self._read_back(folder)}"
            )
        llama = LlamaCpp(1)
        if not llama.is_installed():
            return NotVerified(
                f"llama.cpp is not installed ({llama.install}){self._read_back(folder)}"
            )
        try:
            dense, off = self._gaps(written)
        except UnknownArchitecture as reason:
            return NotVerified(str(reason))
        unit = f"nats on average, where the original file is off by {dense:.2g}"
        most = max(TIMES_DENSE * dense, NATS)
        return Verified(
            f"llama.cpp (xllamacpp {llama.version})", off, most, unit
        ).checked()

    def _gaps(self, written: Path) -> tuple[float, float]:
        """How far llama.cpp is from transformers, in nats: with the original file, and
        with the written one.
        """
        import torch

        from ..models.gguf_copies import has_copy, read_model
        from ..models.loading import load
        from ..running.repaired import RepairedPlan
        from ..running.skipping import skip

        vocabulary = len(self.source.tensors[EMBEDDING].data)
        prompts = torch.randint(
            vocabulary, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0)
        )
        if has_copy(self.dense):
            model, _ = load(self.dense, dtype="float32", device="cpu")
        else:  # to make one would take room for good
            model = read_model(self.dense)

        def gap(file: Path, plan: Plan) -> float:
            likeliest = next_token_logprobs(file, *prompts.tolist())
            with skip(model, plan), torch.inference_mode():
                expected = model(prompts).logits[:, -1].log_softmax(-1)
            return mean(
                abs(float(row[i]) - said)
                for row, few in zip(expected, likeliest)
                for i, said in few.items()
            )

        plan = self.plan
        if isinstance(
            plan, RepairedPlan
        ):  # whose weights replace others than a file of fewer bits has
            plan = plan.model_copy(update={"replaced": {}})
        return gap(self.dense, Plan()), gap(written, plan)

    def _read_back(self, folder: Path) -> str:
        """What transformers reads of the plan's weights, before anything is cut out, in
        words.

        Raises `NotAsSkipped` where it reads others.
        """
        weights: Mapping[str, Tensor] = getattr(self.plan, "weights", {})
        whole = self.whole
        if self.plan.prefill:
            weights = weights_in(self.source, getattr(self.plan, "prompt_weights", {}))
            whole = replace(self.source, tensors=in_places(self.source, self.tensors))
        if not weights:
            return ""
        from ..models.gguf_copies import read_model

        with temporary(folder.parent / self.dense.name) as file:
            write_gguf(file, self.source, whole.fields, whole.tensors)
            try:
                read = dict(read_model(file).named_parameters())
            except UsageError as reason:
                said = str(reason).replace(str(file), self.dense.name)
                return f"; its weights were not read back: {said}"
        if unknown := weights.keys() - read.keys():
            return (
                "; its weights were not read back: transformers reads no"
                f" {min(unknown)} from it"
            )
        by = f"transformers {version('transformers')}, which reads the weights back,"
        off = max(
            _off(read[path].detach().float(), weight.float())
            for path, weight in weights.items()
        )
        Verified(by, off, MOST_OFF, "of the largest number of each").checked()
        return (
            f"; its weights, read back by transformers, are the plan's within {off:.2g}"
        )


def _off(found: "Tensor", expected: "Tensor") -> float:
    """The largest difference, over the largest number."""
    if found.shape != expected.shape:
        return math.inf
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def cut(source: GGUF, plan: Plan) -> tuple[Fields, Tensors]:
    """Fields and tensors of the file without what `plan` skips. Raises `UsageError`
    where no file can say so.
    """

    def fits(attention: int, mlp: int) -> bool:
        """Whether the MLP of one block can stand in another's place: it runs after the
        attention, and is alike.
        """
        block = source.block(attention)
        parallel = source.architecture in ("arctic", "gptneox") and source.setting(
            "use_parallel_residual", True
        )
        has_norm = any(
            name.startswith(("ffn_norm.", "post_attention_norm.", "post_ffw_norm."))
            for name in block
        )
        return (
            has_norm
            and source.mlp(attention).keys() == source.mlp(mlp).keys()
            and not parallel
        )

    _check(source, plan)
    if plan.prefill:
        return with_prompt_skips(source, plan)
    layers = regroup(
        [_kinds(source, index) for index in range(source.depth)], plan, fits
    )
    if all(layer.is_ordinary for layer in layers):
        return _ordinary(source, layers)
    return deci(source, layers)


def _check(source: GGUF, plan: Plan) -> None:
    shape = Fingerprint.parse(plan.fingerprint)
    ours = (source.depth, source.count("embedding_length"))
    numbers = {
        int(match[1])
        for name in source.tensors
        if (match := re.match(r"blk\.(\d+)\.", name))
    }
    if numbers != set(range(len(numbers))) or len(numbers) != source.depth:
        raise UsageError(
            f"{source.path.name} has {several(len(numbers), 'block')}, and says"
            f" {source.depth}; download it again"
        )
    if shape and (shape.layers, shape.hidden_size) != ours:
        told = (
            f"this plan was made for {plan.fingerprint}, but {source.path.name} is"
            f" {ours[0]}x{ours[1]}"
        )
        raise UsageError(f"{told}; {FOR_THIS_MODEL}")
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
        lacking = [
            index for index in getattr(plan, kind) if kind not in _kinds(source, index)
        ]
        if lacking:
            raise UsageError(
                f"the plan skips the {kind} of layer {lacking[0]}, which has none in"
                f" {source.path.name}"
            )


def _kinds(source: GGUF, index: int) -> Sequence[str]:
    if source.architecture not in HYBRIDS:
        return BOTH
    names = [
        name for name in source.block(index) if not name.split(".")[0].endswith("_norm")
    ]
    has = {
        kind: any(name.startswith("ffn_") == (kind == "mlp") for name in names)
        for kind in BOTH
    }
    return [kind for kind in BOTH if has[kind]]


def _ordinary(source: GGUF, layers: Sequence[Layer]) -> tuple[Fields, Tensors]:
    attentions = [layer.attention for layer in layers]
    mlps = [layer.mlp for layer in layers if layer.mlp is not None]
    _check_rules_by_index(source, attentions, mlps)
    start = f"{source.architecture}."
    fields = dict(source.fields)
    for name, field in source.fields.items():
        if (
            name.startswith((start, "xielu."))
            and isinstance(field.value, list)
            and len(field.value) == source.depth
        ):
            by_mlp = any(
                word in name for word in ("feed_forward", "expert", "xielu", "swiglu")
            )
            fields[name] = Field(
                [field.value[index] for index in (mlps if by_mlp else attentions)],
                field.kind,
            )
    fields[f"{start}block_count"] = Field.of(len(layers))
    if lead := source.setting("leading_dense_block_count", 0):
        fields[f"{start}leading_dense_block_count"] = Field.of(
            sum(index < lead for index in mlps)
        )
    fields |= {
        start + name: Field(kinds, GGUFValueType.BOOL)
        for name, kinds in _orders(source, attentions)
    }
    tensors = source.outside_blocks
    scales = [_output_scale(source, index) for index in range(source.depth)]
    for number, (attention, mlp, by) in enumerate(
        zip(attentions, mlps, folded(layers, scales))
    ):
        parts = source.attention(attention) | source.mlp(mlp)
        if any(scale != 1 for scale in scales):
            parts |= _scaled(source, parts, by)
        tensors |= {f"{BLOCK}{number}.{name}": tensor for name, tensor in parts.items()}
    return fields, tensors


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


def _scaled(source: GGUF, parts: Tensors, by: Folded) -> Tensors:
    """The number of a layer, and the norms behind what comes late for the numbers of
    those that were cut.
    """
    late = {"post_attention_norm.weight": by.attention, "post_ffw_norm.weight": by.mlp}
    new = {
        name: _floats(source, name, parts[name]) / scale
        for name, scale in late.items()
        if scale != 1
    }
    if OUTPUT_SCALE in parts:
        new[OUTPUT_SCALE] = np.full_like(
            _floats(source, OUTPUT_SCALE, parts[OUTPUT_SCALE]), by.whole
        )
    return {
        name: GGUFTensor(np.float32(values), Kind.F32) for name, values in new.items()
    }


def _floats(source: GGUF, name: str, stored: GGUFTensor) -> np.ndarray[Any, Any]:
    if stored.quantization != Kind.F32 or stored.data.ndim != 1 or not stored.data.size:
        raise UsageError(
            f"{source.path.name} has {name} in another form than llama.cpp's converter;"
            " download it again"
        )
    return stored.data


def _check_rules_by_index(
    source: GGUF, attentions: Sequence[int], mlps: Sequence[int]
) -> None:
    name = source.architecture
    if any(
        source.setting(given, 0)
        for given in ("attention.shared_kv_layers", "embedding_length_per_layer_input")
    ):
        told = (
            f"layers of this {name} share keys and values, or each is given an input of"
            " its own"
        )
        raise UsageError(f"{told}, so that none can be cut out; skip in memory")
    listed = name in LISTING or source.setting(LISTED, [])
    rules = [
        (
            "full attentions",
            1 if listed else source.count(INTERVAL, INTERVALS.get(name, 1)),
            attentions,
        ),
        ("attentions without RoPE", WITHOUT_ROPE.get(name, 1), attentions),
        (
            "MLPs with experts",
            source.setting("interleave_moe_layer_step", 1) or 1,
            mlps,
        ),
    ]
    for what, period, indices in rules:
        if any(
            _is_last(number, period) != _is_last(index, period)
            for number, index in enumerate(indices)
        ):
            told = (
                f"llama.cpp takes every {period}th layer of {name} for one of the"
                f" {what}, and this plan moves them"
            )
            raise UsageError(
                f"{told}; leave out whole runs of {period} blocks, or export to hf"
            )
    telling = {"gemma2": 46, "gemma3": 62, "baichuan": 32}.get(name)
    if telling in (source.depth, len(attentions)) and source.depth != len(attentions):
        told = (
            f"llama.cpp computes a {name} of {telling} layers in another way than any"
            " other"
        )
        raise UsageError(f"{told}, so that one cannot become the other; export to hf")


def _is_last(index: int, period: int) -> bool:
    return index % period == period - 1


def _orders(
    source: GGUF, attentions: Sequence[int]
) -> Iterator[tuple[str, list[bool]]]:
    """Lists of the kinds of layers that the file lacks, where the architecture has them
    in an order.
    """
    name, pattern = source.architecture, "attention.sliding_window_pattern"
    period = source.setting(pattern, WINDOWS.get(name, 1))
    has_windows = name in WINDOWS and source.setting("attention.sliding_window", 1)
    if has_windows and not isinstance(
        period, list
    ):  # which is cut with the other lists
        yield pattern, [not _is_last(index, period) for index in attentions]
    if name in LISTING and not source.setting(LISTED, []):
        period = source.count(INTERVAL, INTERVALS[name])
        recurrent = [not _is_last(index, period) for index in attentions]
        if recurrent != [
            not _is_last(number, period) for number in range(len(attentions))
        ]:
            yield LISTED, recurrent


def deci(source: GGUF, layers: Sequence[Layer]) -> tuple[Fields, Tensors]:
    """Fields and tensors of the file. Raises `UsageError` for an architecture that
    `deci` does not compute.
    """
    heads, kv_heads, head_size, hidden, width = _deci_sizes(source)
    rows = list(sparse_layers(layers))
    tensors = source.outside_blocks
    for number, (attention, mlp) in enumerate(rows):
        parts: Tensors = {}
        if attention is not None:
            parts |= _rotated(
                source.attention(attention), source.architecture, heads, kv_heads
            )
        elif number == 0:  # llama.cpp reads the size of heads only if layer 0 has some
            parts |= _silent("attn", ("q", "k", "v"), "output", head_size, hidden)
        parts |= (
            _silent("ffn", ("gate", "up"), "down", NARROW, hidden)
            if mlp is None
            else source.mlp(mlp)
        )
        tensors |= {f"{BLOCK}{number}.{name}": tensor for name, tensor in parts.items()}
    has_heads = [attention is not None for attention, _ in rows]
    counts: dict[str, int | list[int]] = {
        "attention.head_count": [
            heads if has else int(number == 0) for number, has in enumerate(has_heads)
        ],
        "attention.head_count_kv": [
            kv_heads if has else int(number == 0)
            for number, has in enumerate(has_heads)
        ],
        "feed_forward_length": [NARROW if mlp is None else width for _, mlp in rows],
        **dict.fromkeys(
            ("attention.key_length", "attention.value_length", "rope.dimension_count"),
            head_size,
        ),
        "block_count": len(rows),
    }
    start = f"{source.architecture}."
    fields = {
        name.replace(start, "deci.", int(name.startswith(start))): f
        for name, f in source.fields.items()
    }
    fields |= {f"deci.{name}": Field.of(value) for name, value in counts.items()}
    return fields | {ARCHITECTURE: Field.of("deci")}, tensors


def _deci_sizes(source: GGUF) -> tuple[int, int, int, int, int]:
    """Heads, those of keys, the size of one, the stream's and the MLPs' widths: as the
    tensors have them, too.
    """
    name = source.architecture
    names = {
        tensor.split(".")[0]
        for index in range(source.depth)
        for tensor in source.block(index)
    }
    foreign = sorted(names - set(DECI_TENSORS))
    if name not in DECI:
        problem = f"llama.cpp has no layers with one sublayer for {name}"
    elif foreign:
        problem = (
            f"llama.cpp's layers with one sublayer have no {foreign[0]}, which this"
            f" {name} has"
        )
    elif any(
        isinstance(source.setting(key), list)
        for key in ("attention.head_count", "feed_forward_length")
    ):
        problem = "the layers of this file differ in size"
    else:
        problem = ""
        hidden, width = (
            source.count("embedding_length"),
            source.count("feed_forward_length"),
        )
        heads, kv_heads = (
            source.count("attention.head_count"),
            source.count("attention.head_count_kv"),
        )
        head_size = source.count("attention.key_length", hidden // heads)
        if source.setting("rope.dimension_count", head_size) != head_size:
            problem = (
                "llama.cpp's layers with one sublayer rotate whole heads, and this"
                " model rotates parts"
            )
    if problem:
        told = f"{problem}, and this plan keeps sublayers that do not alternate"
        raise UsageError(f"{told}; choose a portable plan, or export to hf")
    sizes = {
        "attn_norm": hidden,
        "attn_q": heads * head_size,
        "attn_k": kv_heads * head_size,
        "ffn_up": width,
    }
    for index in range(source.depth):
        found = {name: tensor.data for name, tensor in source.block(index).items()}
        if any(
            len(found.get(f"{name}.weight", ())) != size for name, size in sizes.items()
        ):
            raise UsageError(
                f"header and tensors of {source.path.name} disagree in block {index};"
                " download it again"
            )
    return heads, kv_heads, head_size, hidden, width


def _rotated(parts: Tensors, architecture: str, heads: int, kv_heads: int) -> Tensors:
    """`deci` rotates neighbours, and qwen2 the halves of a head: row i of each first
    half goes before its second's.
    """
    if architecture == "llama":
        return parts
    rotated = dict(parts)
    for name, tensor in parts.items():
        if count := {"attn_q": heads, "attn_k": kv_heads}.get(name.split(".")[0]):
            rotated[name] = GGUFTensor(
                halves_paired(tensor.data, count), tensor.quantization
            )
    return rotated


def _silent(
    kind: str, into: Sequence[str], back: str, inner: int, width: int
) -> Tensors:
    """A sublayer of zeros: its matrices from the stream to `inner` numbers, that back,
    and its norm.
    """
    parts = {f"{kind}_{name}.weight": _zeros(inner, width) for name in into}
    return parts | {
        f"{kind}_{back}.weight": _zeros(width, inner),
        f"{kind}_norm.weight": _zeros(width),
    }


def _zeros(*shape: int) -> GGUFTensor:
    """In 8 bits where rows allow it: a block of zero bytes is a block of zeros."""
    if len(shape) > 1 and shape[-1] % 32 == 0:
        return GGUFTensor(
            np.zeros(quant_shape_to_byte_shape(shape, Kind.Q8_0), np.uint8), Kind.Q8_0
        )
    return GGUFTensor(np.zeros(shape, np.float32), Kind.F32)
