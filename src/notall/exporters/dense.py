"""The original model as files, of which no weight is loaded before it is written, and
exports of it as such files.
"""

import json
import re
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from typing_extensions import Self

from ..checkpoint_files import ADAPTER, named_weights, refuse_adapter
from ..errors import UsageError
from ..files import contents, own_file, saving
from ..models.configs import load_config, model_source, reader_of, refuse_export
from ..models.devices import named_dtype
from ..models.identity import identify
from ..models.load_errors import explained, quiet
from ..models.names import named_gguf
from ..models.quantisation import quantisation_name, quantisation_of, why_not_here
from ..models.weightless import build_empty
from ..plan import Plan, several
from ..progress import Progress
from ..running.repaired import RepairedPlan
from ..running.skipping import refuse_skipping, skip
from ..strict_json import Settings
from ..structure.locating import locate
from ..structure.model_structure import (
    ModelStructure,
    Sublayer,
    base_model,
    text_config,
)
from . import UNPACKED, Export, Source
from .manifest import Origin
from .tensors import FLOATS, Notes, Weights, check_tensors, read_tensors, write_shards

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
# What goes along with the weights, in upper or lower case: of the tokenizer, settings,
# and terms.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model", "tokenizer.model.v*", "*.tiktoken",
    "tiktoken.model", "tekken.json", "vocab.json", "vocab.txt", "merges.txt",
    "bpe.codes", "emoji.json", "spiece.model", "spm.model", "sentencepiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
    "generation_config.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "license*", "licence*", "copying*", "notice*",
    "use_policy*",
)  # fmt: skip


@dataclass(frozen=True)
class DenseModel:
    """`settings` is config.json as it is written, `config` what transformers makes of
    it.
    """

    folder: Path
    settings: Settings
    config: PretrainedConfig
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
        found: dict[str, set[int]] = {}
        for name in self.tensors:
            if match := re.match(rf"((?:.*?\.)?{re.escape(last)}\.)(\d+)\.", name):
                found.setdefault(match[1], set()).add(int(match[2]))
        depth = len(self.structure.blocks)
        whole = [
            prefix for prefix, numbers in found.items() if numbers >= set(range(depth))
        ]
        alike = max(
            map(self._alike, whole), default=0
        )  # another may be a stack of layers that see, say
        whole = [prefix for prefix in whole if self._alike(prefix) == alike]
        if len(whole) != 1:
            told = (
                f"the files of {self.origin.model} hold {len(whole)} stacks of"
                f" {several(depth, 'layer')} named {last!r}"
            )
            raise UsageError(f"{told}, expected one; fetch or save the model again")
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
        """The tensors of one sublayer, by their names below its layer. Raises
        `UsageError` where names do not tell.
        """
        index, scaled_by = (
            sublayer.index,
            self.structure.blocks[sublayer.index].scaled_by,
        )
        own = (item for item in self.layers[index].items() if item[0] != scaled_by)
        return {
            name: tensor
            for name, tensor in own
            if self._owner(index, name) == sublayer.kind
        }

    def _owner(self, index: int, name: str) -> str:
        """The kind of sublayer of a tensor of a layer; of a renamed one, that of whose
        modules one is in no file.
        """
        layer, absent = self.layer(index), []
        for part in self.structure.blocks[index].sublayers:
            if any(name.startswith(f"{module}.") for module in part.modules):
                return part.kind
            weighing = [
                one
                for one in part.modules
                if next(layer.get_submodule(one).parameters(), None) is not None
            ]
            stored = {
                one
                for one in weighing
                for name in self.layers[index]
                if name.startswith(f"{one}.")
            }
            if stored != set(weighing):
                absent.append(part.kind)
        if len(absent) != 1:
            told = (
                f"cannot tell whether {name} of layer {index} is of the attention or of"
                " the MLP"
            )
            raise UsageError(
                f"{told}, because transformers renames it on loading; skip whole blocks"
            )
        return absent[0]

    def with_weights(self, plan: RepairedPlan) -> "DenseModel":
        """With those of a repair. Raises `UsageError` where files differ, and where
        they are of another model.
        """
        tensors = dict(self.tensors)
        for path, weight in plan.weights.items():
            name = self.prefix + path.removeprefix(f"{self.structure.layers}.")
            stored = tensors.get(name)
            if (
                stored is None
                or stored.shape != tuple(weight.shape)
                or stored.dtype not in FLOATS
            ):
                told = (
                    f"the files of {self.origin.model} do not hold {path} as the model"
                    " does"
                )
                raise UsageError(
                    f"{told} (it is renamed, fused or quantised there): export the plan"
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
        tensors = {
            path: (
                tensor.changed(lambda values: values, dtype=name)
                if tensor.dtype in {*FLOATS} - {name}
                else tensor
            )
            for path, tensor in self.tensors.items()
        }
        says = "torch_dtype" if "torch_dtype" in self.settings else "dtype"
        settings = {**self.settings, says: str(dtype).removeprefix("torch.")}
        return replace(self, tensors=tensors, settings=settings, dtype=dtype)

    def unlike_llama(self, families: Sequence[str]) -> str:
        """Why engines whose layers are Llama's do not run it; nothing where they
        may.
        """
        config = self.config
        window = getattr(config, "use_sliding_window", True) and getattr(
            config, "sliding_window", None
        )
        if config.model_type not in families:
            return f"{config.model_type} is not built of Llama's layers"
        if config.hidden_act != "silu":
            return f"its activation is {config.hidden_act}, not silu"
        if self.quantisation is not None:
            return f"its weights are quantised ({quantisation_name(self.quantisation)})"
        is_narrow = window and window < config.max_position_embeddings
        return f"its attention has a window of {window} tokens" if is_narrow else ""

    def load(self) -> PreTrainedModel:
        """With its weights. Raises `UsageError` where transformers does not run its
        quantisation here.
        """
        if self.quantisation is not None and (
            reason := why_not_here(self.quantisation)
        ):
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
    }
    model, report = loader.from_pretrained(folder, dtype=dtype or "auto", **how)
    wrong = [*report["missing_keys"], *report["mismatched_keys"]]
    if wrong:
        raise UsageError(
            f"the architecture does not match {several(len(wrong), 'tensor')}, such as"
            f" {wrong[0]}"
        )
    return model.eval()


def probe_tokens(model: PreTrainedModel, width: int) -> Tensor:
    """Two sequences by which two models are compared, (2, width)."""
    return torch.randint(
        text_config(model).vocab_size,
        (2, width),
        generator=torch.Generator().manual_seed(0),
    )


@dataclass
class CheckpointExport(Export):
    """A folder of safetensors: config.json, weights by their new names with notes in
    their headers, texts by name.
    """

    dense: DenseModel
    plan: Plan
    settings: Settings
    tensors: Weights
    use: str
    files: Mapping[str, str]
    notes: Notes
    unpacked: ClassVar[str] = UNPACKED

    def __post_init__(self) -> None:
        self.origin, self.form = self.dense.origin, self.settings["model_type"]
        self.dense_bytes, self.written_bytes = (
            sum(weight.size for weight in weights.values())
            for weights in (self.dense.tensors, self.tensors)
        )
        wanted = (*COMPANIONS, *(("*.py",) if self.dense.trusted else ()))
        names = sorted(path.name for path in self.dense.folder.iterdir())
        listed = (
            name
            for name in names
            if any(fnmatchcase(name.lower(), one) for one in wanted)
        )
        self.companions = [
            file for name in listed if (file := own_file(self.dense.folder, name))
        ]

    @classmethod
    @abstractmethod
    def of(cls, dense: DenseModel, plan: Plan) -> Self:
        """Raises `UsageError` where the target cannot express the plan."""

    @classmethod
    @contextmanager
    def prepared(cls, source: Source, plan: Plan) -> Iterator[Self]:
        is_gguf = isinstance(source.model, str | Path) and named_gguf(source.model)
        dtype = source.dtype or (cls.unpacked if is_gguf else None)
        if dtype:
            named_dtype(dtype)  # refused before a model is fetched
        with opened(source) as dense:
            plan.check(dense.structure)
            if isinstance(plan, RepairedPlan):
                dense = dense.with_weights(plan)
            yield cls.of(dense.in_dtype(named_dtype(dtype)) if dtype else dense, plan)

    @property
    def texts(self) -> dict[str, str]:
        return {**self.files, "config.json": json.dumps(self.settings, indent=2) + "\n"}

    def write(self, folder: Path, shard_bytes: int, progress: Progress) -> None:
        for name, text in self.texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        write_shards(folder, self.tensors, shard_bytes, progress, self.notes)
        self.copy_companions(folder)

    def skipped_logits(self) -> tuple[Tensor, Tensor]:
        """Token ids, (2, 13), and what the original model that skips the plan answers:
        (2, 13, vocabulary).
        """
        model = self.dense.load()
        tokens = probe_tokens(model, 13)
        with skip(model, self.plan), torch.inference_mode():
            return tokens, model(input_ids=tokens).logits

    def copy_companions(self, folder: Path) -> None:
        for file in self.companions:
            if not (
                folder / file.name
            ).exists():  # what the export has written itself stays
                shutil.copyfile(file, folder / file.name)


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
                "model": Path(model.name_or_path).name or model.config.model_type,
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
    refuse_adapter(name, (folder / ADAPTER).exists())
    config = load_config(folder, trust_remote_code=trust_remote_code)
    weights, tensors = read_tensors(folder, named_weights(name, config))
    model = build_empty(config)
    structure = locate(model)
    if not structure.cuttable:
        told = (
            f"layers of {config.model_type} depend on each other, and none can be cut"
            " out of its checkpoint"
        )
        raise UsageError(
            f"{told}; keep the original checkpoint with the plan file, and skip in"
            " memory"
        )
    check_tensors(name, model, tensors)
    depth, card = len(structure.blocks), own_file(folder, "README.md")
    origin = Origin(
        **identity,
        layers=depth,
        fingerprint=structure.fingerprint,
        weights=weights,
        card=card,
    )
    return DenseModel(
        folder, settings, config, model, structure, tensors, origin, trust_remote_code
    )
