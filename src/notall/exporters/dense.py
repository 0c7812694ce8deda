"""The dense model as files: its config, and where each sublayer's tensors lie. No weight is loaded."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
from ..models.folders import ADAPTER, named_weights, own_file, refuse_adapter
from ..models.load_errors import explained, quiet
from ..models.loading import build_empty, identify, load_config, model_source, reader_of
from ..models.quantisation import quantisation_of
from ..records.strict_json import Settings
from ..running.opening import refuse_export
from ..running.skipping import is_skipping
from ..structure.anatomy import Anatomy, Sublayer, base_model
from ..structure.locating import locate
from .manifest import Origin
from .tensors import FLOATS, CastTensor, LiveTensor, StoredTensor, read_notes, total_bytes
from .weights import Tensors, check_tensors, read_tensors

# Other forms of the same weights, which a download need not fetch.
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.tflite", "consolidated*")


@dataclass(frozen=True)
class DenseModel:
    """`settings` is config.json as it is written, `config` what transformers makes of it.

    Of a model that sees too the files are all here, and plans speak of its text part.
    """

    folder: Path
    settings: Settings
    config: PretrainedConfig
    empty: PreTrainedModel  # on the meta device
    anatomy: Anatomy
    tensors: Tensors
    origin: Origin
    trusted: bool  # whether the model's own code may be run
    dtype: torch.dtype | None = None  # another than the files'

    @property
    def text(self) -> PretrainedConfig:
        """The config of the text part: `config` itself where there is no other."""
        return self.config.get_text_config(decoder=True)

    def text_settings(self, settings: Settings) -> Settings:
        """The part of `settings` that describes the text part: all of them where they tell no parts."""
        parts = (name for name in self.config.sub_configs if getattr(self.config, name, None) is self.text)
        own = settings.get(next(parts, ""))
        return own if isinstance(own, dict) else settings

    @property
    def reader(self) -> Any:
        """The auto class that reads its checkpoint, and those of its exports."""
        return reader_of(self.config)

    @property
    def own_bytes(self) -> int:
        """What the tensors weigh in the files."""
        return total_bytes({name: getattr(tensor, "source", tensor) for name, tensor in self.tensors.items()})

    @property
    def quantisation(self) -> Settings | None:
        """The settings of quantised weights, as config.json words them; None where they are plain."""
        told = quantisation_of(self.config)
        return told and self.settings.get("quantization_config", told)

    @cached_property
    def notes(self) -> dict[str, str]:
        """What the headers of the files say beside their tensors."""
        files = sorted({tensor.file for tensor in self.tensors.values() if isinstance(tensor, StoredTensor)})
        return {name: note for file in files for name, note in read_notes(file).items()}

    @cached_property
    def prefix(self) -> str:
        """What the names of layer tensors begin with, in the files: such as `model.layers.`."""
        last = self.anatomy.layers.rpartition(".")[2]
        found: dict[str, set[int]] = {}
        for name in self.tensors:
            if match := re.match(rf"((?:.*?\.)?{re.escape(last)}\.)(\d+)\.", name):
                found.setdefault(match[1], set()).add(int(match[2]))
        depth = len(self.anatomy.blocks)
        whole = [prefix for prefix, numbers in found.items() if numbers >= set(range(depth))]
        if len(whole) > 1:  # beside a stack of layers that see, say
            alike = max(map(self._alike, whole))
            whole = [prefix for prefix in whole if self._alike(prefix) == alike]
        if len(whole) != 1:
            raise UsageError(
                f"the files of {self.origin.model} hold {len(whole)} stacks of {depth} layers named {last!r}, "
                "expected one; fetch or save the model again"
            )
        return whole[0]

    def _alike(self, prefix: str) -> int:
        """How many tensors of the first layer after `prefix` are of the model's first layer, by name and shape."""
        layer = self.empty.get_submodule(f"{self.anatomy.layers}.0")
        stored = {name: tensor.shape for name, tensor in self.tensors.items() if name.startswith(f"{prefix}0.")}
        return sum(stored.get(f"{prefix}0.{name}") == weight.shape for name, weight in layer.named_parameters())

    @cached_property
    def outside_layers(self) -> Tensors:
        """Embeddings, final norm, head: what every plan keeps."""
        return {name: tensor for name, tensor in self.tensors.items() if not name.startswith(self.prefix)}

    @cached_property
    def _layers(self) -> list[Tensors]:
        """The tensors of each layer, by their names below it."""
        layers: list[Tensors] = [{} for _ in self.anatomy.blocks]
        for name, tensor in self.tensors.items():
            number, _, rest = name.removeprefix(self.prefix).partition(".")
            if name.startswith(self.prefix) and int(number) < len(layers):
                layers[int(number)][rest] = tensor
        return layers

    def block(self, index: int) -> Tensors:
        """The tensors of both sublayers of a layer, by their names below it."""
        return self._layers[index]

    def parts(self, sublayer: Sublayer) -> Tensors:
        """The tensors of one sublayer, by their names below its layer. Raises `UsageError` where names do not tell."""
        owner, scaled_by = self._owners(sublayer.index), self.anatomy.blocks[sublayer.index].scaled_by
        held = self._layers[sublayer.index]
        return {name: tensor for name, tensor in held.items() if name != scaled_by and owner(name) == sublayer.kind}

    def with_weights(self, weights: Mapping[str, Tensor]) -> DenseModel:
        """With these values of parameters, by their paths in the model, in the dtypes of the files.

        Raises `UsageError` where the files hold a parameter under another name, in another shape or quantised.
        """
        tensors = dict(self.tensors)
        for path, weight in weights.items():
            name = self.prefix + path.removeprefix(f"{self.anatomy.layers}.")
            stored = tensors.get(name)
            if stored is None or stored.shape != tuple(weight.shape) or stored.dtype not in FLOATS:
                raise UsageError(
                    f"the files of {self.origin.model} do not hold {path} as the model does (it is renamed, fused or "
                    "quantised there), so that its repaired weights cannot be written; export the plan unrepaired"
                )
            tensors[name] = LiveTensor(stored.dtype, stored.shape, weight.detach().cpu().to(FLOATS[stored.dtype]))
        return replace(self, tensors=tensors)

    def in_dtype(self, dtype: torch.dtype) -> DenseModel:
        """With its floats in another dtype. Raises `UsageError` where they are quantised, so that they have none."""
        if self.quantisation is not None:
            raise UsageError(f"{self.origin.model} is quantised, so that no dtype can be chosen; leave --dtype out")
        name = next(name for name, ours in FLOATS.items() if ours == dtype)
        tensors = {
            path: CastTensor(name, tensor)
            if tensor.dtype in FLOATS and tensor.dtype != name and not isinstance(tensor, CastTensor)
            else tensor
            for path, tensor in self.tensors.items()
        }
        says = "torch_dtype" if "torch_dtype" in self.settings else "dtype"
        settings = {**self.settings, says: str(dtype).removeprefix("torch.")}
        return replace(self, tensors=tensors, settings=settings, dtype=dtype)

    def _owners(self, index: int) -> Any:
        """A function from the name of a tensor of layer `index` to the kind of the sublayer that it is of.

        A name may be nobody's, where transformers renames on loading (Mixtral's block_sparse_moe). It is then that
        sublayer's of whose own modules one is in no file.
        """
        block, held = self.anatomy.blocks[index], self._layers[index]
        layer = self.empty.get_submodule(f"{self.anatomy.layers}.{index}")

        def is_absent(module: str) -> bool:
            weighs = any(True for _ in layer.get_submodule(module).parameters())
            return weighs and not any(name.startswith(module + ".") for name in held)

        parts = block.sublayers
        absent = [part.kind for part in parts if any(is_absent(module) for module in part.modules)]

        def owner(name: str) -> str:
            for part in parts:
                if any(name.startswith(module + ".") for module in part.modules):
                    return part.kind
            if len(absent) != 1:
                raise UsageError(
                    f"cannot tell whether {name} of layer {index} is of the attention or of the MLP, because "
                    "transformers renames it on loading; skip whole blocks"
                )
            return absent[0]

        return owner


@contextmanager
def opened(
    model: PreTrainedModel | str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Iterator[DenseModel]:
    """The dense model of a spec as files, fetched if it is a hub id; a live model is saved to a scratch folder first.

    Raises `UsageError` when the model is unknown, out of reach, damaged or not in safetensors files.
    """
    if not isinstance(model, str | Path):
        with tempfile.TemporaryDirectory(prefix="notall-") as scratch:
            identity = _save(base_model(model), tokenizer, Path(scratch))
            yield _read(Path(scratch), identity, trust_remote_code)
        return
    source = model_source(model, revision)
    if not isinstance(source, Path):
        with explained(source):
            source = Path(snapshot_download(source, revision=revision, ignore_patterns=[*OTHER_WEIGHTS]))
    yield _read(source, identify(model, revision=revision), trust_remote_code)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> dict[str, str]:
    if is_skipping(model):
        raise UsageError("the model is inside a `with notall.skip(...)`; leave it, and give the plan to the export")
    locate(model)  # refuse before writing gigabytes
    with quiet():
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return {"model": Path(model.name_or_path).name or model.config.model_type, "revision": "in memory"}


def _read(folder: Path, identity: dict[str, str], trust_remote_code: bool) -> DenseModel:
    name = identity["model"]
    refuse_export(folder)
    settings = _settings(folder)
    refuse_adapter(name, (folder / ADAPTER).exists())
    config = load_config(folder, trust_remote_code=trust_remote_code)
    weights, tensors = read_tensors(folder, named_weights(name, config))
    model = build_empty(config)
    anatomy = locate(model)
    if not anatomy.cuttable:
        raise UsageError(
            f"layers of {config.model_type} depend on each other, and none can be cut out of its checkpoint; keep the "
            "dense checkpoint with the plan file, and skip in memory"
        )
    check_tensors(name, model, tensors)
    origin = Origin(
        **identity,
        layers=len(anatomy.blocks),
        fingerprint=anatomy.fingerprint,
        weights=weights,
        card=own_file(folder, "README.md"),
    )
    return DenseModel(folder, settings, config, model, anatomy, tensors, origin, trust_remote_code)


def _settings(folder: Path) -> Settings:
    """config.json as it is written."""
    path = own_file(folder, "config.json")
    if path is None:
        raise UsageError(f"{folder.name} has no config.json; download or save it again")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise UsageError(f"{folder.name}: config.json is damaged; download it again")
    return settings
