"""Run what was written, and compare it with the dense model that skips the plan in memory."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UsageError
from ..models.load_errors import explained, quiet
from ..models.quantisation import why_not_here
from ..plan import Plan
from ..running.skipping import skip
from ..structure.model_structure import cache_argument, text_config
from ..structure.proving import relative_error, tolerance
from .dense import DenseModel
from .manifest import NotVerified, Verdict, Verified
from .tensors import Weights, check_copies

TOKENS, PADDING = 12, 5  # two sequences of 12 tokens, 5 of the first being padding on the left
UNIT = "of the largest logit"


def verify(dense: DenseModel, plan: Plan, exported: Path, loader: Any, tensors: Weights) -> Verdict:
    """Raise `UsageError` unless the model in `exported`, read by the class `loader`, answers as the skipped one.

    Compared are the logits of a left-padded batch and those of one more token through the cache. One of the two models
    is in memory at a time. Of a quantised model that transformers does not run here, only its `tensors` are compared.
    """
    try:
        model = _dense(dense)
    except UsageError as error:
        if dense.quantisation is None:
            raise
        check_copies(exported, tensors)
        return NotVerified(f"{error}; each tensor is the dense model's, bit for bit")
    with skip(model, plan):
        expected = _logits_of(model)
    del model
    with explained(exported.name), quiet():
        found = _logits_of(_load(loader, exported, dense.trusted))
    by, most = f"transformers {transformers.__version__}", tolerance(expected.dtype)
    return Verified(by, relative_error(found, expected), most, UNIT).checked()


def _dense(dense: DenseModel) -> PreTrainedModel:
    if dense.quantisation is not None and (reason := why_not_here(dense.quantisation)):
        raise UsageError(reason)
    with explained(dense.origin.model), quiet():
        return _load(dense.reader, dense.folder, dense.trusted, dense.dtype)


def verify_in_mlx(dense: DenseModel, plan: Plan, exported: Path) -> Verdict:
    """As `verify`, in MLX-LM, on a batch without padding; says so where MLX-LM is not installed."""
    if find_spec("mlx_lm") is None:
        return NotVerified("MLX-LM is not installed (pip install mlx-lm)")
    model = _dense(dense)
    tokens = _tokens(model)
    with skip(model, plan), torch.inference_mode():
        expected = model(input_ids=tokens).logits
    most = 1e-3 if expected.dtype == torch.float32 else 5e-2  # its kernels are its own
    error = relative_error(logits_in_mlx(exported, tokens), expected)
    return Verified(f"MLX-LM {version('mlx-lm')}", error, most, UNIT).checked()


def logits_in_mlx(folder: Path, tokens: Tensor) -> Tensor:
    """The logits of token ids, (batch, tokens), without padding: (batch, tokens, vocabulary)."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    answer = model(mx.array(tokens.tolist())).astype(mx.float32)
    return torch.tensor(answer.tolist())


def _load(loader: Any, folder: Path, trusted: bool, dtype: torch.dtype | None = None) -> PreTrainedModel:
    how = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True, "trust_remote_code": trusted}
    model, report = loader.from_pretrained(folder, dtype=dtype or "auto", **how)
    wrong = [*report["missing_keys"], *report["mismatched_keys"]]
    if wrong:
        raise UsageError(f"{len(wrong)} tensors do not match the architecture, {wrong[0]} for one")
    return model.eval()


def _logits_of(model: PreTrainedModel) -> Tensor:
    """(unpadded tokens of the prompts and the two that follow, vocabulary)."""
    tokens = _tokens(model)
    mask = torch.ones_like(tokens)
    mask[0, :PADDING] = 0
    with torch.inference_mode():
        prompt = model(input_ids=tokens[:, :TOKENS], attention_mask=mask[:, :TOKENS], use_cache=True)
        name = cache_argument(model)
        step = model(input_ids=tokens[:, TOKENS:], attention_mask=mask, use_cache=True, **{name: prompt[name]})
    return torch.cat([prompt.logits[mask[:, :TOKENS].bool()], step.logits[:, -1]])


def _tokens(model: PreTrainedModel) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(text_config(model).vocab_size, (2, TOKENS + 1), generator=draw)
