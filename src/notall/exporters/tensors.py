"""The weights of a checkpoint: each tensor is read when it is written, one shard at a
time, and its bytes stay.
"""

import copy
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    get_safetensors_metadata,
    snapshot_download,
    split_state_dict_into_shards_factory,
)
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint_files import INDEX
from ..errors import UsageError, shortened
from ..files import expanded, saving
from ..models.devices import NO_HUB_KERNELS
from ..models.load_errors import check_weights, explained, quiet
from ..models.names import hub_id, resolved
from ..models.own_exports import first_file, shard_index, weight_files
from ..progress import Progress, silent
from ..strict_json import read_json
from ..tensor_files import Notes

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Weight:
    """A tensor to write: its dtype and its shape as safetensors words them, its bytes,
    and how to read or make it.
    """

    dtype: str
    shape: tuple[int, ...]
    size: int
    read: Callable[[], Tensor]

    def read_bytes(self) -> Tensor:
        """The values as they lie in a file: bytes, (size,)."""
        return self.read().contiguous().flatten().view(torch.uint8)

    def changed(
        self,
        change: Callable[[Tensor], Tensor],
        shape: tuple[int, ...] | None = None,
        dtype: str | None = None,
    ) -> "Weight":
        """What `change` makes of its values when it is written, rounded to its dtype or
        this one of `FLOATS`.
        """
        shape, dtype = shape or self.shape, dtype or self.dtype
        size = math.prod(shape) * FLOATS[dtype].itemsize
        return Weight(dtype, shape, size, lambda: change(self.read()).to(FLOATS[dtype]))

    def holding(self, values: Tensor) -> "Weight":
        """With other values, rounded to its dtype."""
        return replace(self, read=lambda: values.detach().cpu().to(FLOATS[self.dtype]))


Weights = dict[str, Weight]


def read_header(path: Path) -> Weights:
    """The tensors of one safetensors file, by name. Raises `UsageError` when the file
    is truncated or damaged.
    """
    try:
        with (
            safe_open(path, framework="pt"),
            open(path, "rb") as file,
        ):  # which has checked all sizes and ranges
            header = read_json(file.read(int.from_bytes(file.read(8), "little")))
    except (SafetensorError, OSError, ValueError) as error:
        reason = shortened(str(error).rpartition("header: ")[2], 120)
        raise UsageError(
            f"{path.name} is no whole safetensors file ({reason}); download the file"
            " again"
        ) from None
    header.pop("__metadata__", None)

    def read(name: str) -> Tensor:
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise UsageError(
                f"cannot read {shortened(name)} of {path.name}: {shortened(str(error))}"
            ) from None

    return {
        name: Weight(
            entry["dtype"], tuple(entry["shape"]), last - first, partial(read, name)
        )
        for name, entry in header.items()
        for first, last in [entry["data_offsets"]]
    }


def read_notes(file: Path) -> Notes:
    """What the headers of `weight_files` hold beyond their tensors."""
    notes: Notes = {}
    for path in weight_files(file):
        with safe_open(path, framework="pt") as opened:
            notes |= opened.metadata() or {}
    return notes


def model_tensors(folder: Path, named: str | None = None) -> tuple[str, Weights]:
    """The file that transformers begins with, and every tensor that it reads, by the
    headers of the shards.
    """
    file = first_file(folder, named)
    tensors: Weights = {}
    for shard in weight_files(file):
        found = read_header(shard)
        if twice := found.keys() & tensors.keys():
            raise UsageError(
                f"{folder.name}: two shards hold {shortened(min(twice))}; download it"
                " again"
            )
        tensors |= found
    if lost := (
        set()
        if file.suffix == ".safetensors"
        else shard_index(file).keys() - tensors.keys()
    ):
        raise UsageError(
            f"{folder.name}: no shard holds {shortened(min(lost))}; download it again"
        )
    return file.name, tensors


def stored_sizes(
    spec: str | Path, revision: str | None = None, named: str | None = None
) -> dict[str, int]:
    """The bytes of each tensor of a model: of a folder, or of a hub id, of whose files
    only the headers are read.
    """
    spec = resolved(spec)
    folder = expanded(spec)
    is_here = folder.is_dir()
    try:
        if not is_here:  # though its files may have been fetched before
            folder = Path(
                snapshot_download(
                    hub_id(spec), revision=revision, local_files_only=True
                )
            )
        return {
            name: tensor.size
            for name, tensor in model_tensors(folder, named)[1].items()
        }
    except (LocalEntryNotFoundError, UsageError):
        if is_here:
            raise
    with explained(spec):
        headers = get_safetensors_metadata(
            hub_id(spec), revision=revision
        ).files_metadata.values()
    ranges = (
        (name, tensor.data_offsets)
        for header in headers
        for name, tensor in header.tensors.items()
    )
    return {name: last - first for name, (first, last) in ranges}


def check_tensors(name: str, model: PreTrainedModel, tensors: Weights) -> None:
    """Raise `UsageError` unless names and shapes are those of `model`, which is on the
    meta device.

    transformers itself loads them, without values. Of a quantised model each module
    must have some.
    """
    config: Any = copy.deepcopy(model.config)
    is_quantised = getattr(config, "quantization_config", None) is not None
    if is_quantised:
        del config.quantization_config
    values = {
        key: torch.empty(tensor.shape, device="meta") for key, tensor in tensors.items()
    }
    how: Any = {
        "device_map": "meta",
        "ignore_mismatched_sizes": is_quantised,
        "output_loading_info": True,
        **NO_HUB_KERNELS,
    }
    try:
        with quiet():
            loaded: Any = type(model).from_pretrained(
                None, config=config, state_dict=values, **how
            )
    # where tensors that it would fuse are not all there, or not alike
    except (RuntimeError, ValueError) as error:
        problem = (
            f"the tensors of {name} are not those of {config.model_type}"
            f" ({shortened(error)})"
        )
        raise UsageError(f"{problem}: fetch it again") from None
    _, report = loaded
    if is_quantised:
        modules = {
            key[: dot.start()] for key in tensors for dot in re.finditer(r"\.", key)
        }
        missing = {
            key
            for key in report["missing_keys"]
            if key.rpartition(".")[0] not in modules
        }
        report = {"missing_keys": missing, "mismatched_keys": (), "unexpected_keys": ()}
    check_weights(name, report)


def write_shards(
    folder: Path,
    tensors: Weights,
    shard_bytes: int,
    progress: Progress = silent,
    notes: Notes | None = None,
) -> None:
    """One file, or shards of about `shard_bytes` and an index, as transformers writes;
    `notes` go into the headers.
    """
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    total, done = sum(weight.size for weight in tensors.values()), 0
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].read().contiguous() for name in names}
        with saving():
            save_file(shard, folder / file, {"format": "pt", **(notes or {})})
        done += sum(tensors[name].size for name in names)
        progress(done, total, "copying weights")
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )


def check_copies(folder: Path, tensors: Weights, texts: Mapping[str, str]) -> None:
    """Raise `UsageError` unless the files in `folder` hold just these tensors, bit for
    bit, and these texts.
    """
    found = model_tensors(folder)[1]
    alike = {name: (one.dtype, one.shape) for name, one in found.items()}
    same = alike == {name: (one.dtype, one.shape) for name, one in tensors.items()}
    same &= all(
        (folder / name).read_text(encoding="utf-8") == text
        for name, text in texts.items()
    )
    if not same or not all(
        torch.equal(found[name].read_bytes(), tensors[name].read_bytes())
        for name in tensors
    ):
        raise UsageError(
            f"{folder.name} does not hold what was written; check the disk, and export"
            " again"
        )
