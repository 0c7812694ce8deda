"""The original model as files, of which no weight is loaded before it is written."""

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..checkpoint_files import ADAPTER_CONFIG, named_weights, refuse_adapter
from ..errors import UsageError
from ..files import contents, own_file, saving
from ..models.configs import load_config, model_source, reader_of, refuse_export
from ..models.devices import NO_HUB_KERNELS
from ..models.identity import identify
from ..models.load_errors import explained, quiet
from ..models.quantisation import quantisation_name, quantisation_of, why_not_here
from ..models.terms import terms_in
from ..models.weightless import build_empty
from ..plan import several
from ..running.repaired import RepairedPlan
from ..running.skipping import refuse_skipping
from ..strict_json import Settings, read_json
from ..structure.locating import locate
from ..structure.model_structure import (
    ModelStructure,
    Sublayer,
    base_model,
)
from . import Source
from .manifest import Origin
from .tensors import FLOATS, Weights, check_tensors, model_tensors

# Other forms of the same weights, which a download need not fetch.
OTHER_WEIGHTS = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.ot",
    "*.tflite",
    "consolidated*",
)


@dataclass(frozen=True)
class DenseModel:
    """The original model as the files of a folder. `tensors` are read when they are
    written.
    """

    folder: Path
    settings: Settings  # config.json as it is written
    config: PretrainedConfig  # and as transformers reads it
    empty: PreTrainedModel  # on the meta device
    structure: ModelStructure
    tensors: Weights
    origin: Origin
    trusted: bool  # whether the model's own code may be run
    dtype: torch.dtype | None = None  # another than the files'

    @property
    def quantisation(self) -> Settings | None:
        """As config.json words it; None where weights are plain."""
        found = quantisation_of(self.config)
        return found and self.settings.get("quantization_config", found)

    @cached_property
    def prefix(self) -> str:
        """What the names of layer tensors begin with, in the files: such as
        `model.layers.`.
        """
        last = self.structure.layers.rpartition(".")[2]
        found: dict[str, set[int]] = {}  # the numbers behind each prefix
        for name in self.tensors:
            if match := re.match(rf"((?:.*?\.)?{re.escape(last)}\.)(\d+)\.", name):
                found.setdefault(match[1], set()).add(int(match[2]))
        depth = len(self.structure.blocks)
        every = set(range(depth))
        whole = [prefix for prefix, numbers in found.items() if numbers >= every]
        # another may be a stack of layers that see, say
        most = max(map(self._alike, whole), default=0)
        whole = [prefix for prefix in whole if self._alike(prefix) == most]
        if len(whole) != 1:
            raise UsageError(
                f"the files of {self.origin.model} hold {len(whole)} stacks of"
                f" {several(depth, 'layer')} named {last!r}, expected one; fetch or save"
                " the model again"
            )
        return whole[0]

    def _alike(self, prefix: str) -> int:
        """How many tensors of the first layer after `prefix` are of the model's first
        layer, by name and shape.
        """
        stored = {
            name: tensor.shape
            for name, tensor in self.tensors.items()
            if name.startswith(f"{prefix}0.")
        }
        return sum(
            stored.get(f"{prefix}0.{name}") == own.shape
            for name, own in self.layer(0).named_parameters()
        )

    def read(self, name: str) -> Settings:
        """A JSON file next to the weights, such as generation_config.json; empty where
        there is none.
        """
        file = own_file(self.folder, name)
        return dict(read_json(contents(file))) if file else {}

    def layer(self, index: int) -> nn.Module:
        """On the meta device."""
        return self.empty.get_submodule(f"{self.structure.layers}.{index}")

    @cached_property
    def outside_layers(self) -> Weights:
        """Embeddings, final norm, head: what every plan keeps."""
        return {
            name: tensor
            for name, tensor in self.tensors.items()
            if not name.startswith(self.prefix)
        }

    @cached_property
    def layers(self) -> list[Weights]:
        """The tensors of each layer, by their names below it."""
        layers: list[Weights] = [{} for _ in self.structure.blocks]
        for name, tensor in self.tensors.items():
            number, _, rest = name.removeprefix(self.prefix).partition(".")
            if name.startswith(self.prefix) and int(number) < len(layers):
                layers[int(number)][rest] = tensor
        return layers

    def parts(self, sublayer: Sublayer) -> Weights:
        """The tensors of one sublayer, by their names below its layer.

        Raises `UsageError` where transformers renames them, so that they may be of
        either sublayer.
        """
        index = sublayer.index
        scaled_by = self.structure.blocks[index].scaled_by  # of no sublayer
        return {
            name: tensor
            for name, tensor in self.layers[index].items()
            if name != scaled_by and self._owner(index, name) == sublayer.kind
        }

    def _owner(self, index: int, name: str) -> str:
        """The kind of sublayer that a tensor of a layer is of.

        A tensor of no module is renamed by transformers: it is of the only sublayer
        whose modules the files don't have.
        """
        absent = []
        for part in self.structure.blocks[index].sublayers:
            if any(name.startswith(f"{module}.") for module in part.modules):
                return part.kind
            if not self._has_all_modules(index, part):
                absent.append(part.kind)
        if len(absent) != 1:
            raise UsageError(
                f"cannot tell whether {name} of layer {index} is of the attention or of"
                " the MLP, because transformers renames it on loading; skip whole"
                " blocks"
            )
        return absent[0]

    def _has_all_modules(self, index: int, part: Sublayer) -> bool:
        """Whether the files have tensors of each module of a sublayer that has some."""
        layer, names = self.layer(index), self.layers[index]
        for path in part.modules:
            has_weights = next(layer.get_submodule(path).parameters(), None) is not None
            if has_weights and not any(name.startswith(f"{path}.") for name in names):
                return False
        return True

    def with_weights(self, plan: RepairedPlan) -> "DenseModel":
        """With those of a repair. Raises `UsageError` where files differ, and where
        they are of another model.
        """
        tensors = dict(self.tensors)
        for path, weight in plan.weights.items():
            name = self.prefix + path.removeprefix(f"{self.structure.layers}.")
            stored = tensors.get(name)
            is_as_in_model = (
                stored is not None
                and stored.shape == tuple(weight.shape)
                and stored.dtype in FLOATS
            )
            if stored is None or not is_as_in_model:
                raise UsageError(
                    f"the files of {self.origin.model} do not hold {path} as the model"
                    " does (it is renamed, fused or quantised there): export the plan"
                    " unrepaired"
                )
            plan.check_replaced({path: stored.read()})
            tensors[name] = stored.holding(weight)
        return replace(self, tensors=tensors)

    def in_dtype(self, dtype: torch.dtype) -> "DenseModel":
        """With its floats in another dtype. Raises `UsageError` where they are
        quantised, so that they have none.
        """
        if self.quantisation is not None:
            raise UsageError(
                f"{self.origin.model} is quantised, so that no dtype can be chosen;"
                " leave --dtype out"
            )
        name = next(name for name, ours in FLOATS.items() if ours == dtype)
        tensors = dict(self.tensors)
        for path, tensor in self.tensors.items():
            if tensor.dtype in FLOATS and tensor.dtype != name:
                tensors[path] = tensor.changed(lambda values: values, dtype=name)
        says = "torch_dtype" if "torch_dtype" in self.settings else "dtype"
        settings = {**self.settings, says: str(dtype).removeprefix("torch.")}
        return replace(self, tensors=tensors, settings=settings, dtype=dtype)

    def unlike_llama(self, families: Sequence[str]) -> str:
        """Why engines whose layers are Llama's do not run it; nothing where they
        may.
        """
        config = self.config
        if config.model_type not in families:
            return f"{config.model_type} is not built of Llama's layers"
        if config.hidden_act != "silu":
            return f"its activation is {config.hidden_act}, not silu"
        if self.quantisation is not None:
            return f"its weights are quantised ({quantisation_name(self.quantisation)})"
        has_window = getattr(config, "use_sliding_window", True)
        window = has_window and getattr(config, "sliding_window", None)
        if window and window < config.max_position_embeddings:
            return f"its attention has a window of {window} tokens"
        return ""

    def load(self) -> PreTrainedModel:
        """With its weights. Raises `UsageError` where transformers does not run its
        quantisation here.
        """
        stored = self.quantisation
        reason = None if stored is None else why_not_here(stored)
        if reason:
            raise UsageError(reason)
        with explained(self.origin.model), quiet():
            return load_whole(
                reader_of(self.config), self.folder, self.trusted, self.dtype
            )


def load_whole(
    loader: Any, folder: Path, trusted: bool, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model in `folder`, read by the class `loader`. Raises `UsageError` unless its
    tensors are all there.
    """
    how = {
        "local_files_only": True,
        "use_safetensors": True,
        "output_loading_info": True,
        "trust_remote_code": trusted,
        **NO_HUB_KERNELS,
    }
    model, report = loader.from_pretrained(folder, dtype=dtype or "auto", **how)
    wrong = [*report["missing_keys"], *report["mismatched_keys"]]
    if wrong:
        raise UsageError(
            f"the architecture does not match {several(len(wrong), 'tensor')}, such as"
            f" {wrong[0]}"
        )
    return model.eval()


@contextmanager
def opened(source: Source) -> Iterator[DenseModel]:
    """The original model as files, fetched if it is a hub id; a live one is saved to a
    scratch folder first.
    """
    model, revision = source.model, source.revision
    if not isinstance(model, str | Path):
        model = base_model(model)
        refuse_skipping(model, "exporting it")
        locate(model)  # refuse before writing gigabytes
        with tempfile.TemporaryDirectory(prefix="notall-") as scratch:
            with quiet(), saving():
                model.save_pretrained(scratch)
                if source.tokenizer is not None:
                    source.tokenizer.save_pretrained(scratch)
            identity = {
                "model": Path(model.name_or_path or "").name or model.config.model_type,
                "revision": "in memory",
            }
            yield _read(Path(scratch), identity, source.trust_remote_code)
        return
    folder = model_source(model, revision)
    if not isinstance(folder, Path):
        with explained(folder):
            folder = Path(
                snapshot_download(
                    folder, revision=revision, ignore_patterns=[*OTHER_WEIGHTS]
                )
            )
    yield _read(folder, identify(model, revision=revision), source.trust_remote_code)


def _read(
    folder: Path, identity: dict[str, str], trust_remote_code: bool
) -> DenseModel:
    name = identity["model"]
    refuse_export(folder)
    settings: Settings | None = None
    if (path := own_file(folder, "config.json")) is None:
        raise UsageError(f"{folder.name} has no config.json; download or save it again")
    with suppress(ValueError, RecursionError):
        settings = json.loads(contents(path))
    if not isinstance(settings, dict):
        raise UsageError(f"{folder.name}: config.json is damaged; download it again")
    refuse_adapter(name, (folder / ADAPTER_CONFIG).exists())
    config = load_config(folder, trust_remote_code=trust_remote_code)
    weights, tensors = model_tensors(folder, named_weights(name, config))
    model = build_empty(config)
    structure = locate(model)
    if not structure.cuttable:
        raise UsageError(
            f"layers of {config.model_type} depend on each other, and none can be cut"
            " out of its checkpoint; keep the original checkpoint with the plan file,"
            " and skip in memory"
        )
    check_tensors(name, model, tensors)
    origin = Origin(
        **identity,
        layers=len(structure.blocks),
        fingerprint=structure.fingerprint,
        weights=weights,
        terms=terms_in(own_file(folder, "README.md")),
    )
    return DenseModel(
        folder, settings, config, model, structure, tensors, origin, trust_remote_code
    )
