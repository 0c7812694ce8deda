"""Write gguf_headers.json by llama.cpp's converter: python record_gguf_headers.py
LLAMA_CPP [FAMILY...].

LLAMA_CPP is a checkout of it. What `with_weights` makes of each file is compared with
the converter's numbers.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [sys.argv[1], f"{sys.argv[1]}/gguf-py"]

import gguf
import numpy as np
import torch
from conversion import ModelType, get_model_class
from conversion.base import ModelBase, get_model_architecture
from transformers import PreTrainedModel

from api import gguf_with_weights, read_gguf
from gguf_families import (
    BUILT,
    RECORDED,
    built,
    folded,
    parameters,
    recorded,
    write_skeleton,
)
from tiny_gguf import WORDS, add_tokenizer

NO_EXPERTS = dict.fromkeys(
    ("num_experts_per_tok", "n_routed_experts", "n_group", "topk_group")
)
# As configs on the hub word what transformers names otherwise, or leaves out.
HUB: dict[str, dict[str, Any]] = {
    "gpt2": {"n_ctx": 1024},
    "gpt_neox": {"rotary_pct": 0.5},
    "cohere2": {"rotary_pct": 1.0},
    "falcon (parallel)": {"num_kv_heads": 1},
    "nemotron_h": (
        {"num_hidden_layers": 6, "hybrid_override_pattern": "M*-M-*"} | NO_EXPERTS
    ),
    "nemotron_h (experts)": {
        "num_hidden_layers": 6,
        "hybrid_override_pattern": "M*EME*",
    },
    "glm4_moe": {"num_nextn_predict_layers": 0},
    "granitemoehybrid": {"layer_types": ["attention", "mamba", "mamba", "attention"]},
    "granitemoehybrid (dense)": {"layer_types": ["mamba", "attention"] * 2},
    "dots1": {"scoring_func": "sigmoid"},
    "gemma4_text (experts)": {"global_head_dim": 16},
    "gemma4_text (nothing shared)": {"global_head_dim": 16},
    "deepseek_v3": {"scoring_func": "sigmoid"},
    "ministral3": {"architectures": ["Ministral3ForCausalLM"]},
    "mpt": {"architectures": ["MPTForCausalLM"]},
}
NOT_OURS = ("general.", "tokenizer.", "GGUF.")


def convert(name: str, model: PreTrainedModel, folder: Path) -> Path:
    """The model's file as the converter writes it, in float32."""
    model.save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    words = {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        "added_tokens": [],
    }
    (folder / "tokenizer.json").write_text(json.dumps(words))
    read = ModelBase.load_hparams
    settings = {**read(folder, False), **HUB.get(name, {})}
    settings = {
        key: value
        for key, value in settings.items()
        if key not in HUB.get(name, {}) or value is not None
    }
    ModelBase.load_hparams = staticmethod(lambda *_, **__: dict(settings))  # type: ignore[method-assign]
    try:
        kind = get_model_class(get_model_architecture(settings, ModelType.TEXT))

        class Tiny(kind):  # type: ignore[valid-type, misc]
            model_arch = kind.model_arch
            no_mtp = True

            def set_vocab(self) -> None:
                add_tokenizer(self.gguf_writer)

        for impl in [*vars(kind).values()]:  # that does the work of another class
            if isinstance(impl, type):
                impl.set_vocab = Tiny.set_vocab
        with torch.inference_mode():
            Tiny(
                folder,
                gguf.LlamaFileType.ALL_F32,
                folder / "tiny.gguf",
                eager=True,
                hparams=settings,
            ).write()
    finally:
        ModelBase.load_hparams = read  # type: ignore[method-assign]
    return folder / "tiny.gguf"


def record(name: str) -> dict[str, Any]:
    """What is kept of a family. Raises `AssertionError` where ours is another file than
    the converter's.
    """
    model = built(name)
    with tempfile.TemporaryDirectory() as scratch:
        file = read_gguf(convert(name, model, Path(scratch)))
        ours = {
            key: field
            for key, field in file.fields.items()
            if not key.startswith(NOT_OURS)
        }
        ours["general.architecture"] = file.fields["general.architecture"]
        fields = {key: (field.kind.name, field.value) for key, field in ours.items()}
        shapes = {key: list(tensor.shape) for key, tensor in file.tensors.items()}
        extra = {
            key: file.tensors[key].data.tolist()
            for key in shapes
            if key.startswith("rope_")
        }
        return {"fields": fields, "tensors": folded(shapes), "numbers": extra}


def compare(name: str, folder: Path) -> None:
    """That ours are the converter's numbers, each of them."""
    model = built(name)
    file = read_gguf(convert(name, model, folder))
    ours = gguf_with_weights(
        read_gguf(write_skeleton(name, folder / "skeleton.gguf")), parameters(model)
    )
    for key, tensor in file.tensors.items():
        np.testing.assert_allclose(
            ours.tensors[key].data, tensor.data, rtol=1e-6, err_msg=f"{name}: {key}"
        )


def main(names: list[str]) -> None:
    known = json.loads(RECORDED.read_text()) if RECORDED.is_file() else {}
    for name in names or BUILT:
        try:
            known[name] = record(name)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}")
            continue
        lines = [
            f"{json.dumps(key)}: {json.dumps(known[key])}"
            for key in BUILT
            if key in known
        ]
        RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        recorded.cache_clear()
        with tempfile.TemporaryDirectory() as scratch:
            compare(name, Path(scratch))
        print(f"{name}: as the converter writes it")


if __name__ == "__main__":
    main(sys.argv[2:])
