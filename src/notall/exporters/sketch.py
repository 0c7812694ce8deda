"""A model of any size whose modules run but whose weights take no memory: enough to find its sublayers.

The meta device would not do: experts choose their tokens by value, and some rotary embeddings refuse it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from ..anatomy import Anatomy, locate
from ..models import _from_config


def sketch(config: PretrainedConfig) -> PreTrainedModel:
    """The model of `config` on the CPU, every weight of each tensor being one zero."""
    config = copy.deepcopy(config)
    config._experts_implementation = "eager"  # the fused ones want weights that are laid out in memory
    with init_empty_weights():
        model = _from_config(config)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
            setattr(module, name, nn.Parameter(zeros, requires_grad=False))
    return model.eval()


def locate_in_sketch(model: PreTrainedModel) -> Anatomy:
    """`locate`, without multiplying anything; what it proves of a sketch is only that its parts run."""
    with _WithoutProducts():
        return locate(model)


class _WithoutProducts(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear:
            return args[0].new_zeros(*args[0].shape[:-1], args[1].shape[0])
        return func(*args, **(kwargs or {}))
