"""What goes along with the weights: tokenizer, processors, chat template, settings, licence. Nothing else does."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from ..models.folders import own_file

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "tokenizer.model.v*", "*.tiktoken", "tiktoken.model", "tekken.json", "vocab.json", "vocab.txt", "merges.txt",
    "bpe.codes", "emoji.json", "spiece.model", "spm.model", "sentencepiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
SETTINGS = (
    "chat_template.jinja", "chat_template.json", "generation_config.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
TERMS = ("license*", "licence*", "copying*", "notice*", "use_policy*")  # in any case


def companions(folder: Path, *, code: bool) -> list[Path]:
    """The files of a dense model's folder that go along; with `code`, its Python files too.

    Raises `UsageError` where one is a link out of the folder.
    """
    wanted = (*TOKENIZER, *SETTINGS, *(("*.py",) if code else ()))
    names = sorted(path.name for path in folder.iterdir())
    listed = [name for name in names if _is_one_of(name, wanted) or _is_one_of(name.lower(), TERMS)]
    return [path for name in listed if (path := own_file(folder, name))]


def copy_companions(files: Iterable[Path], folder: Path) -> None:
    """Copy files into the folder of an export; what it has written itself stays."""
    for file in files:
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def _is_one_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
