"""Models of a config alone: without weights, or with dummy ones to be timed."""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
)

from ..files import expanded
from ..integrity import SMALL_FILE_BYTES, check_manifest
from ..plan import Plan
from ..running.missing import without
from .configs import (
    load_config,
    own_dtype,
    reader_of,
    refuse_misread,
    settings_of_export,
)
from .load_errors import explained, quiet
from .names import resolved
from .own_exports import (
    own_export,
)
from .quantisation import quantisation_of


def load_empty(
    spec: str | Path,
    dtype: torch.dtype | None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a config without weights, in `dtype` or as the checkpoint has it,
    quantised or not; see `load`.
    """
    spec = resolved(spec)
    with explained(spec):
        check_manifest(expanded(spec), most=SMALL_FILE_BYTES)
        settings = settings_of_export(spec, revision)
        if settings is None:
            config = load_config(
                spec, revision=revision, trust_remote_code=trust_remote_code
            )
            if quantisation_of(config) and (dtype or expanded(spec).is_file()):
                del config.quantization_config  # unpacked, as it were
            return build_empty(config, dtype or own_dtype(config))
        export = own_export(spec, settings)
        refuse_misread(spec, export.config)
        model = build_empty(export.config, dtype or own_dtype(export.config))
        without(model, Plan(**export.missing))
        return model


def build_empty(
    config: PretrainedConfig, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model of a config on the meta device: every module and shape, no memory."""
    with torch.device("meta"):
        return _from_config(config, dtype)


def build_random(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
) -> PreTrainedModel:
    """The model of a config with dummy weights, to be timed: matrices of small noise,
    vectors of ones.
    """
    with init_empty_weights():
        model = _from_config(config, dtype)
    # drawing billions of numbers would take minutes; a prime length, so that rows of a
    # matrix differ from each other
    noise = torch.empty(1_000_003).uniform_(
        -0.03, 0.03, generator=torch.Generator().manual_seed(seed)
    )
    with explained(config.model_type):  # a device may be too small
        noise = noise.to(device, dtype)
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                dummy = torch.ones(weight.shape, dtype=dtype, device=device)
                if dummy.dim() > 1:
                    for piece in dummy.view(-1).split(noise.numel()):
                        piece.copy_(noise[: piece.numel()])
                placed = nn.Parameter(dummy, requires_grad=weight.requires_grad)
                setattr(module, name, placed)
        model.tie_weights()
        model.to(device)  # type: ignore[arg-type]  # a decorator of it hides `self`
        return model.eval()


def _from_config(
    config: PretrainedConfig, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    # Code of the model's own was allowed when its config was loaded.
    trusted = type(config).__module__.startswith("transformers_modules")
    with explained(config.model_type), quiet():
        model: PreTrainedModel = reader_of(config).from_config(
            config, dtype=dtype, trust_remote_code=trusted
        )
        return model
