"""MLX-LM as a check of nemotron-nas exports, where it is installed (`pip install mlx-lm`, with `mlx[cpu]` on Linux)."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor


def is_installed() -> bool:
    return importlib.util.find_spec("mlx_lm") is not None


def release() -> str:
    return version("mlx-lm")


def logits_of(folder: Path, tokens: Tensor) -> Tensor:
    """The logits of token ids, (batch, tokens), without padding: (batch, tokens, vocabulary)."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    answer = model(mx.array(tokens.tolist())).astype(mx.float32)
    return torch.tensor(answer.tolist())
