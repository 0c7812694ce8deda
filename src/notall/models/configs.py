"""From a spec to a config and to what transformers can load, without any weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    PretrainedConfig,
)

from ..errors import UsageError, shortened
from ..files import contents, expanded
from ..strict_json import DoubledKey, Settings, read_json
from .devices import DTYPES
from .gguf_copies import TRANSFORMERS_MAJOR, convert_gguf, converted_folder
from .gguf_file import open_gguf
from .load_errors import SAFETENSORS_ONLY, explained, quiet
from .names import DEFAULT_MODEL, NAMED_SHAPES, hub_id, named_gguf, resolved
from .own_exports import (
    NEMOTRON_NAS,
    REGROUPED,
    SWIFTKV,
)

Options = dict[str, Any]  # of `from_pretrained`


def load_config(
    spec: str | Path = DEFAULT_MODEL,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PretrainedConfig:
    """A model's config without its weights: `spec` as in `load`, or a config.json, or
    one of SHAPES.
    """
    if spec in NAMED_SHAPES:
        return transformers.LlamaConfig(**NAMED_SHAPES[str(spec)])
    spec = resolved(spec)
    with explained(spec):
        gguf, path = named_gguf(spec), expanded(spec)
        if path.is_dir():
            refuse_no_model(path)
        source: Path | str
        if gguf:
            source = converted_folder(gguf)
        elif path.exists():
            source = path
        else:
            source = hub_id(spec)
        file = {}
        if gguf and not Path(source).is_dir():
            open_gguf(gguf)  # refuses what transformers would read for hours
            source, file = gguf.parent, {"gguf_file": gguf.name}
        with quiet():
            config = AutoConfig.from_pretrained(
                source, **file, **options_of(source, revision, trust_remote_code)
            )
    refuse_misread(spec, config)
    return config


def refuse_no_model(folder: Path) -> None:
    """Raise `UsageError` for a folder without a config."""
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{shortened(folder)} has no config.json: give the folder of a model, or"
            " its .gguf file itself"
        )


def own_dtype(config: PretrainedConfig) -> torch.dtype:
    """The dtype that a checkpoint's config names; float32 where it names none of
    ours.
    """
    own = getattr(config, "dtype", None)
    named = own or getattr(config.get_text_config(), "dtype", None)
    return DTYPES.get(str(named).removeprefix("torch."), torch.float32)


def reader_of(config: PretrainedConfig) -> Any:
    """The auto class that reads the model of a config: of one that sees too, its text
    part alone where there is one.
    """
    plain = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    seeing = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if type(config) in seeing and type(config) not in plain:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def refuse_export(folder: Path) -> None:
    """Raise `UsageError` where a folder holds an export in a form of its own: it has no
    original model's files.
    """
    if settings_of_export(folder, None):
        problem = f"{shortened(folder.name)} is an export already"
        raise UsageError(
            f"{problem}: give the original model, and a plan that skips what both skip"
        )


def settings_of_export(spec: str | Path, revision: str | None) -> Settings | None:
    """config.json of what `notall export` wrote in a form of its own; None for any
    other model.
    """
    spec = resolved(spec)
    if spec in NAMED_SHAPES or named_gguf(spec):
        return None
    path = expanded(spec)
    if path.exists():
        try:
            settings = read_json(
                contents(path / "config.json" if path.is_dir() else path)
            )
        except UsageError:
            raise
        except (
            DoubledKey
        ) as error:  # of which transformers takes the last, and people the first
            problem = f"config.json of {shortened(path)} has {shortened(error)} twice"
            raise UsageError(f"{problem}: take one away") from None
        except (ValueError, OSError):  # for transformers to complain of
            return None
    else:
        with explained(spec), quiet():
            settings = PretrainedConfig.get_config_dict(
                hub_id(spec), revision=revision
            )[0]
    form = str(settings.get("model_type")) if isinstance(settings, dict) else ""
    is_ours = form in (NEMOTRON_NAS, SWIFTKV) or form.startswith(REGROUPED)
    return settings if is_ours else None


def model_source(spec: str | Path, revision: str | None) -> Path | str:
    """What transformers can load a spec from: a folder with a config and safetensors,
    or a hub id.
    """
    spec = resolved(spec)
    if spec in NAMED_SHAPES:
        raise UsageError(
            f"{spec} is a shape without weights: give a model, or time it with dummy"
            " weights"
        )
    if gguf := named_gguf(spec):
        return convert_gguf(gguf)
    path = expanded(spec)
    if not path.exists():
        return hub_id(spec)
    if not path.is_dir():
        raise UsageError(
            f"{spec} is no model: give a folder, a .gguf file, a hub id or"
            f" {DEFAULT_MODEL}"
        )
    if revision is not None:
        raise UsageError(
            f"{spec} is a local folder, which has no revisions: leave revision out"
        )
    refuse_no_model(path)
    if not any(path.glob("*.safetensors")):
        raise UsageError(f"{spec} has no safetensors weights: {SAFETENSORS_ONLY}")
    return path


def options_of(
    source: Path | str, revision: str | None, trust_remote_code: bool
) -> Options:
    """Options of `from_pretrained` that all parts of one model share."""
    return {
        "local_files_only": isinstance(source, Path),
        "trust_remote_code": trust_remote_code,
        "revision": revision or "main",
    }


def _attentions_in(config: PretrainedConfig) -> Iterator[str]:
    """The attention implementations that a config names, for itself and for its
    parts.
    """
    named = getattr(config, "_attn_implementation_internal", None)
    names = named.values() if isinstance(named, dict) else [named]
    yield from map(str, names)
    for part in vars(config).values():
        if isinstance(part, PretrainedConfig):
            yield from _attentions_in(part)


def refuse_misread(spec: str | Path, config: PretrainedConfig) -> None:
    """A damaged config may ask for layers that would take hours, and any for code of
    the hub.
    """
    if kernels := sorted(name for name in _attentions_in(config) if "/" in name):
        asks = (
            f"asks for attention code of the hub ({shortened(kernels[0])}), which is"
            " not run"
        )
        fix = "take attn_implementation out of config.json"
        raise UsageError(f"the config of {shortened(str(spec))} {asks}: {fix}")
    text = config.get_text_config(decoder=True)
    for name in (
        "num_hidden_layers",
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
    ):
        count = getattr(text, name, None)
        if isinstance(count, int) and count > 20_000:  # Doge has 16,384
            raise UsageError(
                f"the config of {spec} has {name} = {count}: it is damaged; fetch it"
                " again"
            )
    # transformers 4 ignores transformers 5's in silence, and computes with defaults
    if TRANSFORMERS_MAJOR == "4" and getattr(config, "rope_parameters", None):
        raise UsageError(
            f"{spec} was saved by transformers 5: read it with transformers>=5.17"
        )
