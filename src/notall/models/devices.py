"""Devices and dtypes by their names."""

from typing import Any

import torch

from ..errors import UsageError, nearest

# Of `from_pretrained`: transformers 5.25 and later fetch kernels from the hub by default.
NO_HUB_KERNELS: dict[str, Any] = {"use_kernels": False}

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_device(name: str = "auto") -> torch.device:
    """A device by its name; `auto` is CUDA, else MPS, else the CPU. Raises UsageError
    if it isn't here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UsageError(
            f"no device {name!r} here: give cpu, cuda, cuda:N, mps or auto"
        ) from error
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """A dtype by its name; `auto` is bfloat16 where that is fast, else float16 on CUDA
    and float32 elsewhere.
    """
    if name != "auto":
        return named_dtype(name, "auto")
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float16
    if device.type == "cpu":
        has_mkldnn = torch.backends.mkldnn.is_available()
        fast = has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16


def named_dtype(name: str, *others: str) -> torch.dtype:
    """A dtype by its name. Raises UsageError, which says to give one of these or of
    `others`, for an unknown one.
    """
    if name not in DTYPES:
        raise UsageError(
            f"unknown dtype {name!r}{nearest(name, [*DTYPES])}: give"
            f" {', '.join([*others, *DTYPES])}"
        )
    return DTYPES[name]
