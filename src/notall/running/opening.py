"""Models by their names: those that transformers knows, and those that `notall export` wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UnknownArchitecture, UsageError, expect, shortened
from ..models import loading
from ..models.causal_model import CausalModel
from ..models.folders import INDEX, SINGLE, own_file
from ..models.gguf_header import check_gguf
from ..models.load_errors import check_weights, explained, quiet
from ..models.names import DEFAULT_MODEL, SHAPES, named_gguf
from ..models.own_exports import OwnExport, is_own_form, own_export, read_settings
from ..models.paths import expanded
from ..models.quantisation import quantisation_of
from ..records.plan import Plan
from ..records.strict_json import Settings, read_json
from .lacking import without

CONFIG = "config.json"
UNREAD = re.compile("architecture deci |`deci`")  # what transformers says of a file that only llama.cpp runs
Loaded = tuple[CausalModel, PreTrainedTokenizerBase]
WEIGHTS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")  # of a hub id that is an export; no code


def load(
    spec: str | Path = DEFAULT_MODEL,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[CausalModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in evaluation mode, and its tokenizer.

    `spec` is "smollm2", a hub id, a folder or a .gguf file. `dtype` is "float32", "bfloat16", "float16", or "auto":
    bfloat16 where that is fast. `device` is "cpu", "cuda", "cuda:1", "mps", or "auto": the fastest there is.
    `device_map`, accelerate's, replaces `device`.

    What `notall.export` wrote is opened as layers of the original architecture, some of which lack a sublayer, and is
    inspected, measured and skipped further like any other model. None of the code beside it is run. Raises `UsageError`
    for a model that is unknown, out of reach or incomplete, and for an export in a form that is not opened here.
    """
    expect(spec, (str, Path), "a hub id, a folder or a file")
    options: dict[str, Any] = {"dtype": dtype, "device": device, "device_map": device_map}
    options |= {"attn_implementation": attn_implementation, "revision": revision}
    with _gguf_explained(spec):
        settings = _settings_of_export(spec, revision)
        if settings is None:
            return cast("Loaded", loading.load(spec, **options, trust_remote_code=trust_remote_code))
    return cast("Loaded", _load_export(spec, own_export(spec, settings), **options))


def load_empty(
    spec: str | Path, dtype: torch.dtype | None, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a config without weights, in a dtype, or else in the checkpoint's own, quantised as it is there.

    `spec` is as in `load`; a config.json, or a name of SHAPES, will do. Raises as `load` does.
    """
    with _gguf_explained(spec):
        settings = _settings_of_export(spec, revision)
        if settings is None:
            config = loading.load_config(spec, revision=revision, trust_remote_code=trust_remote_code)
            if quantisation_of(config) and (dtype or expanded(spec).is_file()):
                del config.quantization_config  # unpacked, as it were
            return loading.build_empty(config, dtype or loading.own_dtype(config))
    export = own_export(spec, settings)
    model = loading.build_empty(export.config, dtype or loading.own_dtype(export.config))
    without(model, Plan(**export.lacking))
    return model


def refuse_export(folder: Path) -> None:
    """Raise `UsageError` where a folder holds an export in a form of its own: it has no dense model's files."""
    if _settings_of_export(folder, None):
        raise UsageError(
            f"{shortened(folder.name)} is an export already: give the dense model, and a plan that skips what both skip"
        )


def _settings_of_export(spec: str | Path, revision: str | None) -> Settings | None:
    """config.json of what `notall export` wrote in a form of its own; None for any other model."""
    if spec in SHAPES or named_gguf(spec):
        return None
    path = expanded(spec)
    if path.exists():
        return _own(path / CONFIG if path.is_dir() else path)
    with explained(spec):
        settings = read_settings(loading.hub_id(spec), revision=revision)
    return settings if is_own_form(settings) else None


def _own(file: Path) -> Settings | None:
    """A config.json that is damaged is for transformers to complain of."""
    try:
        settings = read_json(file.read_bytes())
    except (ValueError, OSError):
        return None
    return settings if isinstance(settings, dict) and is_own_form(settings) else None


def _load_export(
    spec: str | Path,
    export: OwnExport,
    *,
    dtype: str,
    device: str,
    device_map: str | dict[str, Any] | None,
    attn_implementation: str | None,
    revision: str | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if device_map is not None and device != "auto":
        raise UsageError("device and device_map both say where the model goes: give one")
    place, lacking = loading.resolve_device(device), Plan(**export.lacking)
    with explained(spec):
        folder = expanded(spec)
        if not folder.exists():
            folder = Path(snapshot_download(str(spec), revision=revision, allow_patterns=[*WEIGHTS]))
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, config=export.config, local_files_only=True)
            tokenizer("a")
            model, report = type(loading.build_empty(export.config)).from_pretrained(
                None,
                config=export.config,
                state_dict=_weights(folder, export),
                dtype=loading.resolve_dtype(dtype, place),
                device_map=device_map or str(place),
                attn_implementation=attn_implementation,
                output_loading_info=True,
            )
    _check(spec, model.eval(), report, lacking)
    return model, tokenizer


def _check(spec: str | Path, model: PreTrainedModel, report: dict[str, Any], lacking: Plan) -> None:
    """Refuse a checkpoint that lacks more than it says, and take out what it lacks."""
    anatomy = without(model, lacking)
    held = {name for name, _ in model.named_parameters()}
    ours = [name for name in map(str, report["missing_keys"]) if name in held or not name.startswith(anatomy.layers)]
    check_weights(spec, report | {"missing_keys": ours})


def _weights(folder: Path, export: OwnExport) -> dict[str, Tensor]:
    """Every tensor of the files, by the names that the model of `export.config` gives them."""
    single = own_file(folder, SINGLE)
    if single:
        shards = [single]
    else:
        index = own_file(folder, INDEX)
        if index is None:
            raise UsageError(f"{folder.name} has no {SINGLE} and no {INDEX}; download it again")
        names = sorted(set(read_json(index.read_bytes())["weight_map"].values()))
        shards = [found for name in names if (found := own_file(folder, name))]
    weights: dict[str, Tensor] = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            weights |= {export.renamed(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return weights


@contextmanager
def _gguf_explained(spec: str | Path) -> Iterator[None]:
    """Say of a GGUF file that we wrote for llama.cpp alone what it is, and what to do."""
    try:
        yield
    except UsageError as error:
        told = _told_of_gguf(spec) if UNREAD.search(str(error)) else None
        if told is None:
            raise
        raise UnknownArchitecture(told) from error


def _told_of_gguf(spec: str | Path) -> str | None:
    from gguf import GGUFReader

    path = named_gguf(spec)
    if path:
        check_gguf(path)  # readers run for hours on a wrong count
    field = GGUFReader(path).get_field("notall.manifest") if path else None
    if path is None or field is None:
        return None
    try:
        manifest = read_json(field.contents())
        dense, plan = str(manifest["dense"]["model"]), Plan(manifest["plan"]["attention"], manifest["plan"]["mlp"])
    except (ValueError, KeyError, TypeError):
        return None
    return (
        f"{shortened(path)} is notall's export of {shortened(dense)} without {shortened(plan)}, in a form that only "
        f"llama.cpp runs (llama-cli -m FILE -fa on); here, give {shortened(dense)} with --plan {shortened(path.parent)}"
    )
