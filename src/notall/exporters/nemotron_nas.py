"""nemotron-nas (DeciLMForCausalLM): one checkpoint for vLLM, MLX-LM, SGLang,
TensorRT-LLM and ExLlamaV3.

Llama-like models fit, and Qwen2 with an output bias of zeros. MLPs are padded with
zeros to a multiple of 256.
"""

import logging
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from math import ceil
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PretrainedConfig

from notall import Plan, UsageError
from notall.plugins import (
    CheckpointExport,
    DenseModel,
    NotVerified,
    Progress,
    Settings,
    Verification,
    Verified,
    Weight,
    check_copies,
    layers_of,
    relative_error,
    rope_names,
    sparse_layers,
)

logger = logging.getLogger(__name__)

MODEL_TYPES = ("llama", "mistral", "qwen2")
MULTIPLE = 256  # engines round an MLP's width up to one of these
KEPT_SETTINGS = (
    "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads",
    "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "bos_token_id",
    "eos_token_id", "pad_token_id", "initializer_range", "attention_bias", "mlp_bias",
    "attention_dropout", "use_cache", "torch_dtype", "dtype", "transformers_version",
)  # fmt: skip
# What the blocks of other models may have.
FFN: Settings = {"replace_with_linear": False, "sparsify": None}
NO_SINK: Settings = {
    "num_sink_tokens": None,
    "unshifted_sink": False,
    "use_prefill_window_in_sink_attention": False,
}
ATTENTION = FFN | NO_SINK | {"window_length": None}

HOW_TO_RUN = (
    "MLX-LM, TensorRT-LLM, SGLang and ExLlamaV3 read this checkpoint as it is, and vLLM"
    " with `--trust-remote-code`, for the small configuration file beside the weights."
    " transformers has no such model: export to hf for it."
)
WITHOUT_FIRST_ATTENTION = (
    "vLLM's own nemotron-nas cannot run a model whose first layer has an MLP and no"
    " attention; for vLLM export to hf"
)


class NemotronExport(CheckpointExport):
    """A folder that engines with DeciLM load."""

    @classmethod
    def of(cls, dense: DenseModel, plan: Plan) -> "NemotronExport":
        """Raises `UsageError` for an architecture that is not Llama's."""
        _check(dense)
        layers = list(sparse_layers(layers_of(dense.structure, plan)))
        use = (
            HOW_TO_RUN
            if layers[0][0] is not None
            else f"{HOW_TO_RUN} {WITHOUT_FIRST_ATTENTION}."
        )
        files = {"configuration_decilm.py": CONFIGURATION}
        settings = _settings(dense, layers)
        tensors = dict(_named(dense, layers))
        return cls(dense, plan, settings, tensors, use, files, notes={})

    def write(self, folder: Path, shard_bytes: int, progress: Progress) -> None:
        """Warn, too, where vLLM cannot run what is written."""
        super().write(folder, shard_bytes, progress)
        if WITHOUT_FIRST_ATTENTION in self.use:
            logger.warning(WITHOUT_FIRST_ATTENTION)

    def verify(self, folder: Path) -> Verification:
        """By its bytes, and in MLX-LM, on a batch without padding; says so where MLX-LM
        is not installed.
        """
        check_copies(folder, self.tensors, self.texts)
        if find_spec("mlx_lm") is None:
            return NotVerified("MLX-LM is not installed (pip install mlx-lm)")
        tokens, expected = self.skipped_logits()
        # its kernels are its own
        most = 1e-3 if expected.dtype == torch.float32 else 5e-2
        error = relative_error(logits_in_mlx(folder, tokens), expected)
        return Verified(
            f"MLX-LM {version('mlx-lm')}", error, most, "of the largest logit"
        ).checked()


def logits_in_mlx(folder: Path, tokens: Tensor) -> Tensor:
    """The logits of token ids, (batch, tokens), without padding: (batch, tokens,
    vocabulary).
    """
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    return torch.tensor(model(mx.array(tokens.tolist())).astype(mx.float32).tolist())


def _check(dense: DenseModel) -> None:
    config = dense.config
    problem = dense.unlike_llama(MODEL_TYPES)
    if not problem:
        size = config.hidden_size // config.num_attention_heads
        if getattr(config, "head_dim", None) not in (None, size):
            problem = "its heads are not the hidden size divided by their number"
    if problem:
        raise UsageError(
            f"nemotron-nas does not fit this model: {problem}; export to hf"
        )


def _settings(
    dense: DenseModel, rows: Sequence[tuple[int | None, int | None]]
) -> Settings:
    config = dense.config
    heads_in_group = config.num_attention_heads // config.num_key_value_heads
    mult = ffn_mult(_width(config), config.hidden_size)
    attentions = (
        ATTENTION | _has(attention, "n_heads_in_group", heads_in_group)
        for attention, _ in rows
    )
    mlps = (FFN | _has(mlp, "ffn_mult", mult) for _, mlp in rows)
    settings = {
        name: dense.settings[name] for name in KEPT_SETTINGS if name in dense.settings
    }
    if config.model_type == "qwen2":
        settings["attention_bias"] = True
    rope: Settings = {
        name: value
        for name, value in dense.settings.items()
        if name.startswith("rope_")
    }
    rope |= rope_names(dense.settings)
    rope.setdefault("rope_theta", 10_000.0)  # others take another default
    return {
        **settings,
        **rope,
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "hidden_act": "silu",
        "num_hidden_layers": len(rows),
        "block_configs": [
            {"attention": attention, "ffn": mlp}
            for attention, mlp in zip(attentions, mlps)
        ],
    }


def _has(index: int | None, name: str, value: float) -> Settings:
    return {name: None if index is None else value, "no_op": index is None}


def ffn_mult(width: int, hidden: int) -> float:
    """The multiplier from which engines compute an MLP's width: int(2 m h / 3), rounded
    up to a multiple of 256.
    """
    mult = 1.5 * width / hidden
    assert ceil(int(2 * mult * hidden / 3) / MULTIPLE) * MULTIPLE == width
    return mult


def _width(config: PretrainedConfig) -> int:
    return ceil(config.intermediate_size / MULTIPLE) * MULTIPLE


def _named(
    dense: DenseModel, rows: Sequence[tuple[int | None, int | None]]
) -> Iterator[tuple[str, Weight]]:
    yield from dense.outside_layers.items()
    for number, (attention, mlp) in enumerate(rows):
        start = f"{dense.prefix}{number}."
        if attention is not None:
            parts = dense.parts(dense.structure.blocks[attention].attention)
            yield from ((start + name, tensor) for name, tensor in parts.items())
            if dense.config.model_type == "qwen2":
                weight = parts["self_attn.o_proj.weight"]
                zeros = weight.changed(
                    lambda one: torch.zeros(len(one)), weight.shape[:1]
                )
                yield f"{start}self_attn.o_proj.bias", zeros
        if mlp is not None:
            for name, tensor in dense.parts(dense.structure.blocks[mlp].mlp).items():
                yield start + name, _padded(name, tensor, _width(dense.config))


def _padded(name: str, weight: Weight, width: int) -> Weight:
    """A tensor of an MLP with zeros behind its values, by which the MLP is `width`
    wide.
    """
    shape = list(weight.shape)
    if name.endswith("down_proj.weight"):
        shape[1] = width
    elif name.rpartition(".")[0].endswith(("gate_proj", "up_proj")):
        shape[0] = width
    more = [
        side
        for new, old in zip(shape[::-1], weight.shape[::-1])
        for side in (0, new - old)
    ]
    return (
        weight.changed(lambda values: pad(values, more), tuple(shape))
        if any(more)
        else weight
    )


CONFIGURATION = (
    files("notall.exporters")
    .joinpath("configuration_decilm.template")
    .read_text(encoding="utf-8")
)
