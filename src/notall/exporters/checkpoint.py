"""Exports that are a config and tensors: a folder of safetensors, with what goes along
with the weights of the original model.
"""

import json
import shutil
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import Self

from ..files import own_file
from ..models.devices import named_dtype
from ..models.names import named_gguf
from ..plan import Plan
from ..progress import Progress
from ..running.repaired import RepairedPlan
from ..running.skipping import skip
from ..strict_json import Settings
from ..structure.model_structure import text_config
from . import UNPACKED, Export, Source
from .dense import DenseModel, opened
from .tensors import Notes, Weights, write_shards

# What goes along with the weights, in upper or lower case: the tokenizer, settings, and
# terms.
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


@dataclass
class CheckpointExport(Export):
    """An export that is a config and tensors: a folder of safetensors.

    `settings` becomes config.json. `tensors` are the weights by their new names, with
    `notes` in the headers of their files. `files` are more texts, by name. `use` is a
    sentence of the model card on how to run it.
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
        self.origin = self.dense.origin
        self.form = self.settings["model_type"]
        self.dense_bytes = sum(weight.size for weight in self.dense.tensors.values())
        self.written_bytes = sum(weight.size for weight in self.tensors.values())
        self.companions = companions_in(self.dense.folder, self.dense.trusted)

    @classmethod
    @abstractmethod
    def of(cls, dense: DenseModel, plan: Plan) -> Self:
        """Work the export out, with no weights in memory. Raises `UsageError` where the
        target cannot express the plan.
        """

    @classmethod
    @contextmanager
    def prepared(cls, source: Source, plan: Plan) -> Iterator[Self]:
        """Open the original model, and yield `of` it. Raises `UsageError` for an
        unknown dtype, a plan of another model, and as `of` does.
        """
        is_gguf = isinstance(source.model, str | Path) and named_gguf(source.model)
        dtype = source.dtype or (cls.unpacked if is_gguf else None)
        if dtype:
            named_dtype(dtype)  # refused before a model is fetched
        with opened(source) as dense:
            plan.check(dense.structure)
            if isinstance(plan, RepairedPlan):
                dense = dense.with_weights(plan)
            if dtype:
                dense = dense.in_dtype(named_dtype(dtype))
            yield cls.of(dense, plan)

    @property
    def texts(self) -> dict[str, str]:
        """The texts that are written, by name: `files` and config.json."""
        return {**self.files, "config.json": json.dumps(self.settings, indent=2) + "\n"}

    def write(self, folder: Path, shard_bytes: int, progress: Progress) -> None:
        """Write the texts, the weights in shards of about `shard_bytes`, and the
        companions of the original's weights.
        """
        for name, text in self.texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        write_shards(folder, self.tensors, shard_bytes, progress, self.notes)
        self.copy_companions(folder)

    def skipped_logits(self) -> tuple[Tensor, Tensor]:
        """Token ids, (2, 13), and their logits in the original model that skips the
        plan: (2, 13, vocabulary).
        """
        model = self.dense.load()
        tokens = probe_tokens(model, 13)
        with skip(model, self.plan), torch.inference_mode():
            return tokens, model(input_ids=tokens).logits

    def copy_companions(self, folder: Path) -> None:
        """Copy tokenizer, terms and the like; a file that the export has written itself
        stays.
        """
        for file in self.companions:
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


def companions_in(folder: Path, with_code: bool) -> list[Path]:
    """The files of a checkpoint that go along with its weights, by name; its Python
    files too with `with_code`.
    """
    patterns = (*COMPANIONS, "*.py") if with_code else COMPANIONS
    found: list[Path] = []
    for name in sorted(path.name for path in folder.iterdir()):
        is_wanted = any(fnmatchcase(name.lower(), pattern) for pattern in patterns)
        if is_wanted and (file := own_file(folder, name)):
            found.append(file)
    return found


def probe_tokens(model: PreTrainedModel, width: int) -> Tensor:
    """Two sequences of token ids by which two models are compared, (2, width)."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(text_config(model).vocab_size, (2, width), generator=draw)
