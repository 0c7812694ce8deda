"""llama.cpp, through the wheel `xllamacpp`: its server runs files, and its routines
pack numbers in its types.
"""

import ctypes
import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGMLQuantizationType as Kind,
    LlamaFileType,
    quant_shape_to_byte_shape,
)
from gguf.quants import dequantize

from ..errors import UnknownArchitecture, UsageError, shortened
from ..files import expanded
from ..models.gguf_file import Field, GGUFTensor, read_gguf, write_gguf
from ..models.names import DEFAULT_MODEL, INSTALL_DEFAULT, hub_id, named_gguf
from . import Engine, Timing, Tokens, medians, resident_bytes
from .worker import EngineFailed, call

Values = np.ndarray[Any, Any]

PLAIN_TYPE = "F16"
FILE_TYPES = {
    PLAIN_TYPE: LlamaFileType.MOSTLY_F16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q5_K_M": LlamaFileType.MOSTLY_Q5_K_M,
    "Q4_K_M": LlamaFileType.MOSTLY_Q4_K_M,
}
# What most tensors get, and what fused queries, keys and values get.
MOST = {"Q8_0": Kind.Q8_0, "Q5_K_M": Kind.Q5_K, "Q4_K_M": Kind.Q4_K}
FUSED = {"Q8_0": Kind.Q8_0, "Q5_K_M": Kind.Q6_K, "Q4_K_M": Kind.Q5_K}
# Where rows are no multiple of 256 values.
NARROWER = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}
FLOAT_KINDS = {Kind.F32: np.float32, Kind.F16: np.float16}
# Matrices that llama.cpp never quantises.
KEPT_PRECISE = re.compile(
    r"_norm\.weight$|ffn_gate_inp\.weight$|(position|token_types)_embd|_rel_b"
    r"|ssm_conv1d|shortconv\.conv"
)

SCORED_AT_ONCE = 8  # windows that are scored together
LIKELIEST = 10  # tokens that are compared
BIAS = 1e4  # more than any logit
LOADING = "error loading model: "  # what llama.cpp prints before its reason

logger = logging.getLogger(__name__)


class LlamaCpp(Engine):
    """GGUF files on llama.cpp's own kernels."""

    name: ClassVar[str] = "llama.cpp"
    package: ClassVar[str] = "xllamacpp"
    install: ClassVar[str] = "pip install 'notall[export]'"
    target: ClassVar[str] = "gguf"
    suffix: ClassVar[str] = ".gguf"

    @property
    def types(self) -> tuple[str, ...]:
        """The types of llama.cpp that are measured, plain ones first."""
        return tuple(FILE_TYPES)

    def check(self, spec: str | Path) -> None:
        """Refuses a file that is quantised already, too."""
        super().check(spec)
        source = dense_gguf(spec)
        kinds = {tensor.quantization for tensor in read_gguf(source).tensors.values()}
        if kinds := kinds - {*FLOAT_KINDS, Kind.BF16}:
            held = ", ".join(sorted(kind.name for kind in kinds))
            fix = (
                "quantising its numbers again costs less than it would; give an F16"
                " file"
            )
            logger.warning("%s is quantised already (%s): %s", source.name, held, fix)

    def source(self, spec: str | Path, folder: Path) -> Path:
        """With plain numbers, so that repaired weights are written as they are."""
        write_in_type(dense_gguf(spec), PLAIN_TYPE, plain := folder / "plain.gguf")
        return plain

    def quantise(self, plain: Path, kind: str, out: Path) -> None:
        """By llama.cpp's own mixture of types."""
        write_in_type(plain, kind, out)

    def score(
        self, checkpoint: Path, windows: Sequence[Tokens]
    ) -> list[list[float | None]]:
        """Several windows at once, each in a slot of the server."""
        together = min(SCORED_AT_ONCE, len(windows))
        server = self._server(checkpoint, max(map(len, windows)), together)

        def read(slot: int) -> list[list[float | None]]:
            return [_nll(server, slot, tokens) for tokens in windows[slot::together]]

        with ThreadPoolExecutor(together) as pool:
            by_slot = list(pool.map(read, range(together)))
        return [
            by_slot[number % together][number // together]
            for number in range(len(windows))
        ]

    def time(self, checkpoint: Path, prompt: Tokens, new: int) -> Timing:
        """By the server's own times."""
        before = resident_bytes()
        server = self._server(checkpoint, len(prompt) + new + 1, 1)
        request = {
            "prompt": list(prompt),
            "max_tokens": 1 + new,
            "temperature": 0,
            "ignore_eos": True,
        }

        def once() -> tuple[float, float]:
            took = _complete(server, request | {"cache_prompt": False})["timings"]
            return took["prompt_ms"], took["predicted_per_token_ms"]

        return medians(once, before)

    def likeliest(
        self, checkpoint: Path, prompts: Sequence[Tokens]
    ) -> list[list[tuple[int, float]]]:
        """The most likely tokens after each prompt, with their log-probabilities in
        nats.
        """
        server = self._server(checkpoint, max(map(len, prompts)) + 1, 1)
        one = {
            "max_tokens": 1,
            "temperature": 0,
            "n_probs": LIKELIEST,
            "ignore_eos": True,
        }

        def answer_to(tokens: Tokens, **how: object) -> Any:
            request = {"prompt": list(tokens), **one, **how}
            choice = _complete(server, request)["choices"][0]
            return choice["logprobs"]["content"][0]

        # half a character has no log-probabilities
        letters = answer_to(prompts[0], grammar="root ::= [a-z]+")["id"]
        found = []
        for tokens in prompts:
            likeliest = answer_to(tokens, logit_bias=[[letters, BIAS]])["top_logprobs"]
            found.append([(entry["id"], entry["logprob"]) for entry in likeliest])
        return found

    @staticmethod
    def reason(stderr: str) -> str:
        """The cause of a file that llama.cpp could not load, in its words."""
        return next(
            (
                shortened(line.partition(LOADING)[2], 160)
                for line in stderr.splitlines()
                if LOADING in line
            ),
            "",
        )

    def _server(self, checkpoint: Path, tokens: int, together: int) -> Any:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(checkpoint)
        settings.n_parallel = together
        settings.n_ctx = (
            together * 64 * math.ceil((tokens + 1) / 64)
        )  # a sequence's cache is a multiple of 64 tokens
        settings.n_batch = settings.n_ctx
        settings.cache_ram_mib = settings.n_ctx_checkpoints = (
            0  # slots keep what is read again
        )
        settings.warmup = False
        settings.verbosity = 1  # errors
        for cores in (settings.cpuparams, settings.cpuparams_batch):
            cores.n_threads = self.threads
            cores.poll = 0
        settings.flash_attn_type = (
            xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
        )
        return xllamacpp.Server(settings)


def next_token_logprobs(path: Path, *prompts: Tokens) -> list[dict[int, float]]:
    """The likeliest tokens after each, with log-probabilities in nats. Raises
    `UnknownArchitecture`, `UsageError`.
    """
    from ..measuring.speed import cores

    try:
        found = [
            *map(
                dict,
                call(
                    LlamaCpp(cores()),
                    "likeliest",
                    checkpoint=path,
                    prompts=[*map(list, prompts)],
                ),
            )
        ]
    except EngineFailed as error:
        kind = (
            UnknownArchitecture
            if "unknown model architecture" in error.reason
            else UsageError
        )
        raise kind(f"llama.cpp cannot run {path.name}: {error.reason}") from None
    if (fewest := min(map(len, found))) < LIKELIEST:
        raise UsageError(
            f"llama.cpp gives {fewest} tokens for {path.name}, expected {LIKELIEST}"
        )
    return found


def dense_gguf(spec: object) -> Path:
    """The GGUF file that a spec means. Raises `UsageError` for another model."""
    path = named_gguf(spec) if isinstance(spec, str | Path) else None
    if path is None:
        if isinstance(spec, str | Path) and not expanded(spec).exists():
            hub_id(spec)
        instead = f"give that file, not {shortened(spec)}"
        fix = INSTALL_DEFAULT if spec == DEFAULT_MODEL else instead
        raise UsageError(f"llama.cpp needs a .gguf file, the original model's: {fix}")
    return path


def _nll(server: Any, slot: int, tokens: Tokens) -> list[float | None]:
    """The NLL of each token but the first; None for one that ends within a character.

    The server reports what it generates alone, as likely as before a bias, which makes
    it the next token of the text.
    """
    found: list[float | None] = []
    for place, token in enumerate(tokens[1:], 1):
        request = {
            "prompt": list(tokens[:place]),
            "max_tokens": 1,
            "temperature": 0,
            "n_probs": 1,
            "logit_bias": [[token, BIAS]],
            "cache_prompt": True,
            "id_slot": slot,
        }
        logprobs = (
            _complete(server, request)["choices"][0]["logprobs"] or {"content": ()}
        )["content"]
        if logprobs and logprobs[0]["id"] != token:
            raise UsageError(
                "llama.cpp generates another token than it is made to; please report"
                " the model"
            )
        found.append(-logprobs[0]["logprob"] if logprobs else None)
    return found


def _complete(server: Any, request: dict[str, Any]) -> Any:
    answer = server.handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    if "error" in answer:
        raise UsageError(
            "llama.cpp refuses:"
            f" {shortened(answer['error'].get('message', answer['error']), 160)}"
        )
    return answer


def write_in_type(source: Path, kind: str, out: Path) -> None:
    """The model of a GGUF file in one of `FILE_TYPES`, whatever it was in. Raises
    `UsageError` as `read_gguf`.
    """
    model = read_gguf(source)
    types = types_of(
        kind, {name: tensor.shape for name, tensor in model.tensors.items()}
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        packed = pool.map(
            lambda name: _packed(model.tensors[name], types[name]), model.tensors
        )
        tensors = dict(zip(model.tensors, packed))
    fields = {**model.fields, "general.file_type": Field.of(int(FILE_TYPES[kind]))}
    if kind != PLAIN_TYPE:
        fields["general.quantization_version"] = Field.of(2)
    write_gguf(out, model, fields, tensors)


def types_of(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Kind]:
    """What each tensor, whose shape is as numpy has it, gets in a file of `kind`: as
    `llama_model_quantize` has it.
    """
    matrices = [
        name
        for name, shape in shapes.items()
        if len(shape) > 1 and not KEPT_PRECISE.search(name)
    ]
    found = dict.fromkeys(shapes, Kind.F32)
    if kind == PLAIN_TYPE:
        return found | dict.fromkeys(matrices, Kind.F16)
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    finer = (
        {head}
        | _finer(matrices, r"attn_(v|qkv|kv_b)\.weight$")
        | _finer(matrices, r"ffn_down(_exps)?\.weight$")
    )
    for name in matrices:
        wanted = MOST[kind]
        if "attn_qkv." in name:
            wanted = FUSED[kind]
        elif name in finer and wanted != Kind.Q8_0:
            wanted = Kind.Q6_K
        width, either = (
            shapes[name][-1],
            (
                wanted,
                NARROWER.get(wanted, wanted),
            ),
        )  # where its blocks divide a row
        found[name] = next(
            (one for one in either if width % GGML_QUANT_SIZES[one][0] == 0), Kind.F16
        )
    return found


def _finer(names: Sequence[str], pattern: str) -> set[str]:
    """Matrices that get more bits: of the first and the last eighth of layers, and of
    every third between.
    """
    ones = sorted(
        (name for name in names if re.search(pattern, name)),
        key=lambda name: int(name.split(".")[1]),
    )
    count, eighth = len(ones), len(ones) // 8
    ends = (*range(eighth), *range(7 * count // 8, count))
    return {
        name
        for place, name in enumerate(ones)
        if place in ends or (place - eighth) % 3 == 2
    }


def _packed(tensor: GGUFTensor, kind: Kind) -> GGUFTensor:
    if tensor.quantization == kind:
        return tensor
    values = (
        dequantize(tensor.data, tensor.quantization)
        if tensor.quantization not in FLOAT_KINDS
        else tensor.data
    )
    if kind in FLOAT_KINDS:
        return GGUFTensor(values.astype(FLOAT_KINDS[kind]), kind)
    return GGUFTensor(pack(np.ascontiguousarray(values, np.float32), kind), kind)


def pack(values: Values, kind: Kind, importance: Values | None = None) -> Values:
    """Float32 values, (..., width), as the bytes of `kind`; `importance`, (width,),
    weighs the error of each column.
    """
    packed = np.empty(quant_shape_to_byte_shape(values.shape, kind), np.uint8)
    rows, width = values.size // values.shape[-1], values.shape[-1]
    by = None if importance is None else importance.ctypes.data
    written = _quantize_chunk()(
        int(kind), values.ctypes.data, packed.ctypes.data, 0, rows, width, by
    )
    assert written == packed.nbytes, (
        f"{kind.name}: {written} bytes, not {packed.nbytes}"
    )
    return packed


@cache
def _quantize_chunk() -> Any:
    """`ggml_quantize_chunk(type, from, to, first row, rows, width, importance)`, which
    answers how many bytes.
    """
    from xllamacpp import xllamacpp

    function = ctypes.CDLL(xllamacpp.__file__).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return function
