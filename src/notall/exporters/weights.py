"""The weights of a checkpoint: the files that transformers reads them from, and that they are the architecture's."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import UsageError, shortened
from ..models.folders import INDEX, SINGLE, own_file
from ..models.load_errors import check_weights, explained, quiet
from ..models.names import hub_id
from ..models.paths import expanded
from ..records.strict_json import read_json
from .tensors import Source, read_header

Tensors = dict[str, Source]


def read_tensors(folder: Path, named: str | None = None) -> tuple[str, Tensors]:
    """The file that transformers begins with, and every tensor that it reads.

    That file is the one that the config has `named`, else the one file where there is one, else the index of shards.
    The index tells the shards alone; what they hold is in their own headers.
    """
    names = (named,) if named else (SINGLE, INDEX)
    file = next((path for name in names if (path := own_file(folder, name))), None)
    if file is None:
        raise UsageError(f"{folder.name} has no {shortened(' and no '.join(names))}; download or save it again")
    if file.suffix == ".safetensors":
        return file.name, read_header(file)
    where = _index(file)
    tensors: Tensors = {}
    for name in sorted(set(where.values())):
        shard = own_file(folder, name)
        if shard is None:
            raise UsageError(f"{folder.name} lacks {shortened(name)}; download it again")
        found = read_header(shard)
        if twice := found.keys() & tensors.keys():
            raise UsageError(f"{folder.name}: two shards hold {shortened(min(twice))}; download it again")
        tensors |= found
    if lost := where.keys() - tensors.keys():
        raise UsageError(f"{folder.name}: no shard holds {shortened(min(lost))}; download it again")
    return file.name, tensors


def stored_sizes(spec: str | Path, revision: str | None = None, named: str | None = None) -> dict[str, int]:
    """The bytes of each tensor of a model: of a folder, or of a hub id, of whose files only the headers are read."""
    if folder := _local(spec, revision, named):
        return {name: tensor.size for name, tensor in read_tensors(folder, named)[1].items()}
    with explained(spec):
        headers = get_safetensors_metadata(hub_id(spec), revision=revision).files_metadata.values()
    ranges = ((name, tensor.data_offsets) for header in headers for name, tensor in header.tensors.items())
    return {name: last - first for name, (first, last) in ranges}


def _local(spec: str | Path, revision: str | None, named: str | None) -> Path | None:
    """The folder of a model that is here; of a hub id, where its weights were fetched before."""
    path = expanded(spec)
    if path.is_dir():
        return path
    try:
        folder = Path(snapshot_download(hub_id(spec), revision=revision, local_files_only=True))
        read_tensors(folder, named)
    except (LocalEntryNotFoundError, UsageError):
        return None
    return folder


def _index(path: Path) -> dict[str, str]:
    """Which shard each tensor is said to be in; as for transformers, an index without a table of metadata is none."""
    try:
        index = read_json(path.read_bytes())
        where = index["weight_map"]
        whole = bool(where) and isinstance(index["metadata"], dict)
        whole = whole and all(isinstance(file, str) for file in where.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UsageError(f"{path.parent.name}: {path.name} is damaged; download it again")
    return where


def check_tensors(name: str, model: PreTrainedModel, tensors: Tensors) -> None:
    """Raise `UsageError` unless names and shapes are those of `model`, which is on the meta device.

    transformers itself loads them, as tensors without values: it knows what it renames and fuses as it loads. Of a
    quantised model, whose tensors have other names, each module must have some.
    """
    config, is_quantised = _unquantised(model.config)
    try:
        with quiet():
            _, report = type(model).from_pretrained(
                None,
                config=config,
                state_dict={key: torch.empty(tensor.shape, device="meta") for key, tensor in tensors.items()},
                device_map="meta",
                ignore_mismatched_sizes=is_quantised,
                output_loading_info=True,
            )
    except (RuntimeError, ValueError) as error:  # where tensors that it would fuse are not all there, or not alike
        raise UsageError(
            f"the tensors of {name} are not those of {config.model_type} ({shortened(str(error), 80)}): "
            "fetch or save it again"
        ) from None
    if is_quantised:
        held = {key[: dot.start()] for key in tensors for dot in re.finditer(r"\.", key)}
        missing = {key for key in report["missing_keys"] if key.rpartition(".")[0] not in held}
        report = {"missing_keys": missing, "mismatched_keys": (), "unexpected_keys": ()}
    check_weights(name, report)


def _unquantised(config: PretrainedConfig) -> tuple[PretrainedConfig, bool]:
    if getattr(config, "quantization_config", None) is None:
        return config, False
    plain: Any = copy.deepcopy(config)
    del plain.quantization_config
    return plain, True
