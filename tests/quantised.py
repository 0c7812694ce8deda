"""Tiny checkpoints of each kind of quantisation, four layers each: written by hand
where that takes no library.

Each keeps the MLP of layer 1 as it is, and those that can treat layer 3 in another way,
by rules that name layers: what an export must cut.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import family

GROUP = 32  # weights that share a scale
WHOLE = "model.layers.1.mlp"  # is not quantised
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}

Packer = Callable[[str, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Kind:
    """One kind of checkpoint; `needs` are the packages without which transformers does
    not load it on a CPU.

    `cut` are its settings without the attention of layer 1 and the MLP of layer 0,
    where they are others: written down by hand.
    """

    name: str
    write: Callable[..., None]
    cut: dict[str, Any]
    needs: tuple[str, ...] = ()
    since: int = (
        4  # the release of transformers that runs it on a CPU; 6: none does, so far
    )
    base: str = "llama"

    @property
    def is_read(self) -> bool:
        return int(transformers.__version__.split(".")[0]) >= self.since

    @property
    def is_written_by_hand(self) -> bool:
        return self.name.split()[0] not in ("bitsandbytes", "torchao")

    def __str__(self) -> str:
        return self.name


def _packed_by_hand(
    folder: Path,
    config: dict[str, Any],
    pack: Packer,
    whole: str | None = WHOLE,
    **changes: Any,
) -> None:
    """Save a tiny Llama with its projections packed, but for those of `whole`."""
    model = family("llama").build(**SIZES | changes)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module.endswith("_proj") and not (whole and whole in module):
            tensors |= {
                f"{module}.{part}": value
                for part, value in pack(module, tensor).items()
            }
        else:
            tensors[name] = tensor
    _save(folder, model, tensors, config)


def _save(
    folder: Path,
    model: PreTrainedModel,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
) -> None:
    model.config.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"architectures": [type(model).__name__], "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(
        {name: value.contiguous() for name, value in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def _rounded(weight: Tensor, bits: int, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """(outputs, inputs) whole numbers around nought, and the (outputs, groups) scales
    that they are multiplied with.
    """
    grouped = weight.reshape(len(weight), -1, group)
    most = 2 ** (bits - 1) - 1
    scales = grouped.abs().amax(-1) / most
    return (grouped / scales[..., None]).round().clamp(-most, most).reshape(
        weight.shape
    ).int(), scales


def _packed(values: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """(rows, columns) numbers from nought on in words of 32 bits, (rows, columns * bits
    / 32).
    """
    many = 32 // bits
    words = values.long().reshape(len(values), -1, many)[
        ..., list(order or range(many))
    ]
    shifted = (words << (torch.arange(many) * bits)).sum(-1)
    return (shifted - ((shifted >> 31) << 32)).int()


def _write_fp8(folder: Path, **changes: Any) -> None:
    def pack(module: str, weight: Tensor) -> dict[str, Tensor]:
        rows, columns = (size // GROUP for size in weight.shape)
        blocks = weight.view(rows, GROUP, columns, GROUP)
        scales = blocks.abs().amax((1, 3)) / 448
        small = (
            (blocks / scales[:, None, :, None])
            .view(weight.shape)
            .to(torch.float8_e4m3fn)
        )
        return {"weight": small, "weight_scale_inv": scales}

    config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [GROUP, GROUP],
        "modules_to_not_convert": ["lm_head", WHOLE],
    }
    _packed_by_hand(folder, config, pack, **changes)


def _write_gptq(folder: Path, dynamic: bool) -> None:
    def pack(module: str, weight: Tensor) -> dict[str, Tensor]:
        numbers, scales = _rounded(weight, 4)
        inputs = weight.shape[1]
        return {
            "qweight": _packed(numbers + 8, 4).T,
            "qzeros": torch.full(
                (inputs // GROUP, len(weight) // 8), 0x77777777, dtype=torch.int32
            ),
            "scales": scales.T.half(),
            "g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
        }

    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
        **({"dynamic": {r"-:model\.layers\.1\.mlp\..*_proj": {}}} if dynamic else {}),
    }
    _packed_by_hand(folder, config, pack, whole=WHOLE if dynamic else None)


def _write_awq(folder: Path) -> None:
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def pack(module: str, weight: Tensor) -> dict[str, Tensor]:
        numbers, scales = _rounded(weight, 4)
        zeros = torch.full((weight.shape[1] // GROUP, len(weight)), 8)
        return {
            "qweight": _packed((numbers + 8).T, 4, order),
            "qzeros": _packed(zeros, 4, order),
            "scales": scales.T.half(),
        }

    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", WHOLE],
    }
    _packed_by_hand(folder, config, pack)


def _write_compressed(folder: Path) -> None:
    def pack(module: str, weight: Tensor) -> dict[str, Tensor]:
        bits = 8 if "layers.3." in module else 4
        numbers, scales = _rounded(weight, bits)
        whole = numbers + 2 ** (bits - 1)
        return {
            "weight_packed": _packed(whole, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }

    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [
            "lm_head",
            *(f"{WHOLE}.{name}_proj" for name in ("gate", "up", "down")),
        ],
        "config_groups": _groups(
            [r"re:.*layers\.[012]\..*proj"], [r"re:.*layers\.3\..*proj"]
        ),
    }
    _packed_by_hand(folder, config, pack)


def _write_mxfp4(folder: Path) -> None:
    """gpt-oss has its experts in blocks of 32 numbers of 4 bits, with an exponent
    each.
    """
    model = family("gpt_oss").build(hidden_size=64, intermediate_size=32)
    draw = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = tensor.shape
            shape = (experts, outputs, inputs // 32)
            tensors[f"{name}_blocks"] = torch.randint(
                256, (*shape, 16), dtype=torch.uint8, generator=draw
            )
            tensors[f"{name}_scales"] = torch.randint(
                123, 127, shape, dtype=torch.uint8, generator=draw
            )
        else:
            tensors[name] = tensor
    kept = [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    _save(
        folder,
        model,
        tensors,
        {"quant_method": "mxfp4", "modules_to_not_convert": kept},
    )


def _by_transformers(folder: Path, config: Any) -> None:
    """Have transformers quantise a plain checkpoint as it loads it, and save what comes
    out.
    """
    plain = folder / "plain"
    family("llama").build(**SIZES).save_pretrained(plain)
    AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config, device_map="cpu"
    ).save_pretrained(folder)


def _write_bitsandbytes(folder: Path, bits: int) -> None:
    from transformers import BitsAndBytesConfig

    _by_transformers(
        folder,
        BitsAndBytesConfig(
            load_in_4bit=bits == 4,
            load_in_8bit=bits == 8,
            bnb_4bit_quant_type="nf4",
            llm_int8_skip_modules=["lm_head", WHOLE],
        ),
    )


def _write_torchao(folder: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    _by_transformers(
        folder,
        TorchAoConfig(
            Int8WeightOnlyConfig(version=2), modules_to_not_convert=["lm_head", WHOLE]
        ),
    )


def _groups(first: list[str], second: list[str]) -> dict[str, Any]:
    def group(bits: int, targets: list[str]) -> dict[str, Any]:
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": GROUP,
        }
        return {"targets": targets, "weights": weights, "format": "pack-quantized"}

    return {"group_0": group(4, first), "group_1": group(8, second)}


def _linears(layer: int) -> list[str]:
    """The projections of a layer, in the order of the alphabet."""
    attention = [f"model.layers.{layer}.self_attn.{name}_proj" for name in "koqv"]
    return [
        *(f"model.layers.{layer}.mlp.{name}_proj" for name in ("down", "gate", "up")),
        *attention,
    ]


MOVED = {"modules_to_not_convert": ["lm_head", "model.layers.0.mlp"]}

KINDS = [
    Kind("fp8", _write_fp8, MOVED, since=5),
    Kind(
        "compressed-tensors",
        _write_compressed,
        {
            "ignore": [
                "lm_head",
                *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
            ],
            "config_groups": _groups([*_linears(0), *_linears(1)], _linears(2)),
        },
        ("compressed_tensors",),
        since=5,
    ),
    Kind(
        "gptq",
        lambda folder: _write_gptq(folder, dynamic=False),
        {},
        ("gptqmodel", "optimum"),
        since=5,
    ),
    Kind(
        "gptq with dynamic rules",
        lambda folder: _write_gptq(folder, dynamic=True),
        {
            "dynamic": {
                rf"-:model\.layers\.0\.mlp\.{name}_proj$": {}
                for name in ("down", "gate", "up")
            }
        },
        since=6,
    ),
    Kind("awq", _write_awq, MOVED, ("gptqmodel",), since=5),
    Kind(
        "bitsandbytes 4-bit",
        lambda folder: _write_bitsandbytes(folder, 4),
        {"llm_int8_skip_modules": ["lm_head", "model.layers.0.mlp"]},
        ("bitsandbytes",),
    ),
    Kind(
        "bitsandbytes 8-bit",
        lambda folder: _write_bitsandbytes(folder, 8),
        {"llm_int8_skip_modules": ["lm_head", "model.layers.0.mlp"]},
        ("bitsandbytes",),
    ),
    Kind("torchao", _write_torchao, MOVED, ("torchao",), since=5),
    Kind("mxfp4", _write_mxfp4, {}, since=5, base="gpt_oss"),
]
