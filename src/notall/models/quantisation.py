"""What a config says of quantised weights, and whether transformers can run them on
this machine.
"""

from collections.abc import Mapping

from transformers import PretrainedConfig
from transformers.quantizers import AutoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import UsageError, shortened
from ..strict_json import Settings
from .load_errors import quiet

# What transformers runs each kind with: a package of its name, or others.
PACKAGES = {name: name for name in ("bitsandbytes", "compressed-tensors", "torchao")}
PACKAGES |= {"awq": "gptqmodel", "gptq": "gptqmodel optimum"}


def quantisation_of(config: PretrainedConfig) -> Settings | None:
    """The quantisation settings of a config, or None. Raises `UsageError` where they
    are no settings.
    """
    settings = getattr(config, "quantization_config", None)
    if isinstance(settings, QuantizationConfigMixin):
        return settings.to_dict()
    if not isinstance(settings, Mapping | None):
        raise UsageError(
            "the quantization_config of this model is damaged; fetch its config.json"
            " again"
        )
    return settings if settings is None else dict(settings)


def quantisation_name(settings: Mapping[str, object]) -> str:
    """Such as `fp8`, `gptq 4-bit` or `compressed-tensors`."""
    method = settings.get("quant_method")
    method = str(
        getattr(method, "value", method) or "bitsandbytes"
    )  # old files of bitsandbytes do not say
    bits = settings.get("bits") or (
        4
        if settings.get("load_in_4bit")
        else 8
        if settings.get("load_in_8bit")
        else None
    )
    return f"{method} {bits}-bit" if bits else method


def why_not_here(settings: Mapping[str, object]) -> str | None:
    """What keeps transformers from running such weights here, and what to install; None
    where nothing does.
    """
    name = quantisation_name(settings)
    package = PACKAGES.get(name.split()[0])
    try:
        with quiet():
            AutoHfQuantizer.from_config(
                dict(settings), pre_quantized=True
            ).validate_environment(device_map=None)
    except Exception as error:  # each quantiser checks in its own way
        reason = shortened(
            (str(error).strip() or type(error).__name__).splitlines()[0].rstrip("."),
            120,
        )
        if not isinstance(error, ImportError):
            return f"transformers cannot run {name} weights here ({reason})"
        fix = f": pip install {package}" if package else f" ({reason})"
        return (
            f"transformers runs {name} weights with a package that is not"
            f" installed{fix}"
        )
    return None
