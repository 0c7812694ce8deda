"""What transformers says while it loads: kept off the terminal, and one line with the
fix where it fails.
"""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from ..errors import UnknownArchitecture, UsageError, shortened
from ..plan import Plan
from ..strict_json import read_json
from .gguf_file import open_gguf
from .names import named_gguf, near_model

SAFETENSORS_ONLY = (
    "no pickle is loaded: save it once with save_pretrained, where you trust it"
)
OFFLINE = "without a network give a folder, a .gguf file or smollm2"
SPELLING = "check its spelling"
NO_SUCH_GGUF = "GGUF model with architecture"
LLAMACPP_ALONE = re.compile(
    "architecture deci |`deci`"
)  # what it says of a file that only llama.cpp runs

# Words of transformers, torch, the hub and the system, and what to do then: the first
# that is found tells.
FIXES = (
    (NO_SUCH_GGUF, "give the model's safetensors instead"),
    (
        "trust_remote_code",
        "read the model's own code, then allow it with trust_remote_code",
    ),
    ("gated repo", "accept its terms on its page, then run `hf auth login`"),
    ("not a valid model identifier|Repository Not Found", SPELLING),
    ("couldn't connect|find the requested files", OFFLINE),
    (
        "out of memory|allocate memory|MemoryError",
        "free some memory, or give a smaller dtype, or device_map='auto'",
    ),
    (
        "No space left",
        "free some disk space, or put the caches elsewhere (HF_HOME, NOTALL_CACHE)",
    ),
    ("No such file or directory", "a file is missing; fetch or save the model again"),
    (
        "backend tokenizer|load tokenizer",
        "its tokenizer is missing: save it there with tokenizer.save_pretrained",
    ),
    ("safetensors", SAFETENSORS_ONLY),
    ("attn_implementation", "give sdpa or eager"),
    (
        "surrogates not allowed|not valid UTF-8",
        "rename the file or folder: its name is no UTF-8",
    ),
)


@contextmanager
def explained(spec: str | Path) -> Iterator[None]:
    """Turn what transformers raises over a user's model into a UsageError: one line
    that names the fix.
    """
    try:
        yield
    except UsageError:
        raise
    # tokenizers raises bare ones, and transformers whatever a damaged file leads it to
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        if (
            LLAMACPP_ALONE.search(message)
            and (gguf := named_gguf(spec))
            and (problem := _export_in(gguf))
        ):
            raise UnknownArchitecture(problem) from error
        fix = next(
            (fix for words, fix in FIXES if re.search(words, message)),
            "check its files, or give another model",
        )
        near = near_model(spec) if fix in (OFFLINE, SPELLING) else ""
        kind = UnknownArchitecture if NO_SUCH_GGUF in message else UsageError
        first = shortened(
            message.split(". ")[0].rstrip("."), 160
        )  # sentence, of what may be pages long
        raise kind(f"cannot load {shortened(spec)}{near}: {first}; {fix}") from error


def check_weights(spec: str | Path, report: dict[str, Any]) -> None:
    """Refuse a model with weights missing, which transformers would make up; warn of
    weights that it passes over.
    """
    if missing := sorted(
        map(str, [*report["missing_keys"], *report["mismatched_keys"]])
    ):
        first = shortened(missing[0])
        raise UsageError(
            f"{shortened(spec)} lacks weights ({len(missing)}, first {first}): fetch or"
            " save it again"
        )
    if unused := sorted(map(str, report["unexpected_keys"])):
        message = (
            f"{spec} has weights that its architecture does not use ({len(unused)},"
            f" first {unused[0]})"
        )
        warnings.warn(message, stacklevel=3)


def _export_in(path: Path) -> str | None:
    """What a GGUF file is that we wrote for llama.cpp alone, and what to do; None of
    any other.
    """
    field = open_gguf(path).get_field("notall.manifest")
    if field is None:
        return None
    try:
        manifest = read_json(field.contents())
        dense, plan = (
            str(manifest["dense"]["model"]),
            Plan(manifest["plan"]["attention"], manifest["plan"]["mlp"]),
        )
    except (ValueError, KeyError, TypeError):
        return None
    problem = (
        f"{shortened(path)} is notall's export of {shortened(dense)} without"
        f" {shortened(plan)}"
    )
    fix = f"here, give {shortened(dense)} with --plan {shortened(path.parent)}"
    return f"{problem}, in a form that only llama.cpp runs (llama-cli -m FILE -fa on); {fix}"


# The loggers of transformers, of models' own code, and of what it loads weights with.
LIBRARIES = (
    "transformers",
    "transformers_modules",
    "accelerate",
    "huggingface_hub",
    "compressed_tensors",
    "torchao",
    "bitsandbytes",
)


@contextmanager
def quiet(*others: str, progress: bool = False) -> Iterator[None]:
    """Without the warnings of transformers, of what it loads weights with and of
    `others`, packages by the names of their loggers; nor its progress bars, unless
    `progress` asks for them.

    The levels of these loggers are put back; those of others are not touched.
    """
    loggers = [logging.getLogger(name) for name in (*LIBRARIES, *others)]
    levels = [logger.level for logger in loggers]
    had_bars = transformers_logging.is_progress_bar_enabled()
    for logger, level in zip(loggers, levels):
        logger.setLevel(max(level, logging.ERROR))
    if not progress:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        if had_bars:
            transformers_logging.enable_progress_bar()
