"""GGUF files as plain folders, which all of transformers understands: copied once and
kept in the cache.
"""

import contextlib
import io
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..cache import cache_folder, make_private, unwritable
from ..digests import digest_of_file
from ..errors import UsageError
from ..files import saving, temporary
from ..integrity import check_files, read_manifest, refuse_unlisted, write_manifest
from ..strict_json import Settings
from .devices import NO_HUB_KERNELS
from .gguf_file import open_gguf, refuse_kv_only
from .load_errors import check_weights, explained, quiet
from .terms import TERMS, terms_in_gguf, write_terms

logger = logging.getLogger(__name__)

TRANSFORMERS_MAJOR = transformers.__version__.split(".")[0]
COPY_FORMAT = 3  # one more whenever the copy of the same file comes out otherwise


def converted_folder(gguf: Path) -> Path:
    """Where the plain copy of a GGUF file is, or would be."""
    # The two lines of transformers write configs that the other misreads in silence
    # (the RoPE base, for one).
    made_by = f"{COPY_FORMAT}-transformers{TRANSFORMERS_MAJOR}"
    return cache_folder("gguf") / f"{digest_of_file(gguf)[:16]}-{made_by}"


def convert_gguf(gguf: Path) -> Path:
    """The folder of a plain copy, made once: float32 safetensors, config and tokenizer.

    Raises `UsageError` for a full disk, and for a file that skips in the prompt alone.
    """
    folder = converted_folder(gguf)
    if _is_whole(folder):
        return folder
    try:
        make_private(folder.parent)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not _is_whole(folder):
                logger.info("copying %s, once, to %s", gguf.name, folder)
                with temporary(folder) as partial:
                    _write_plain_copy(gguf, partial)
                    write_manifest(partial, {"copy_of": gguf.name})
                    shutil.rmtree(folder, ignore_errors=True)
                    partial.replace(folder)
    except OSError as error:
        if error.errno is None:  # not the disk's word but transformers'
            raise
        raise unwritable(folder.parent, error) from error
    return folder


def has_copy(gguf: Path) -> bool:
    """Whether there is a whole plain copy of a GGUF file."""
    return _is_whole(converted_folder(gguf))


def _is_whole(folder: Path) -> bool:
    try:
        files = read_manifest(folder, "made anew")["files"]
        check_files(folder, files, "made anew")
        refuse_unlisted(folder, files)
    except UsageError as error:
        if folder.is_dir():
            logger.warning("%s", error)
        return False
    return True


def read_model(gguf: Path) -> PreTrainedModel:
    """The model of a GGUF file as transformers reads it, in float32; no copy is made.

    Raises `UsageError` for a damaged file, and `UnknownArchitecture` for one that
    transformers does not know.
    """
    with explained(gguf), quiet(), contextlib.redirect_stderr(io.StringIO()):
        return _read(gguf).eval()


def _write_plain_copy(gguf: Path, folder: Path) -> None:
    """Read a GGUF file with transformers, and save the model as if it had never been
    one.
    """
    own = _smollm_tokenizer(gguf)  # first, as it refuses a damaged file
    fields = open_gguf(gguf).fields
    refuse_kv_only(gguf, fields)
    stated = {
        name: fields[name].contents() for name in TERMS.values() if name in fields
    }
    with quiet(), saving(), contextlib.redirect_stderr(io.StringIO()):
        read = _read(gguf)
        tokenizer: PreTrainedTokenizerBase = own or AutoTokenizer.from_pretrained(
            gguf.parent, **_source(gguf)
        )
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
        plain.load_state_dict(read.state_dict(), assign=True)
        plain.tie_weights()
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    write_terms(folder / "README.md", terms_in_gguf(stated))


def _read(gguf: Path) -> PreTrainedModel:
    """With plain numbers. Its progress bars, on stderr, obey no switch."""
    # transformers 5 keeps GGUF blocks packed where it has kernels for them
    plain_numbers = getattr(transformers, "GgufConfig", None)
    unpacked = (
        {"quantization_config": plain_numbers(dequantize=True)} if plain_numbers else {}
    )
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        **_source(gguf),
        **unpacked,
        **NO_HUB_KERNELS,
        dtype=torch.float32,
        output_loading_info=True,
    )
    model, report = loaded
    check_weights(gguf, report)
    if hasattr(model.config, "quantization_config"):  # with it, save_pretrained refuses
        del model.config.quantization_config
    return model


def _source(gguf: Path) -> Settings:
    return {
        "gguf_file": gguf.name,
        "local_files_only": True,
        "trust_remote_code": False,
    }


def _smollm_tokenizer(gguf: Path) -> PreTrainedTokenizerFast | None:
    """That of a SmolLM file's header, whose digits and BOS transformers gets wrong;
    None for other files.
    """
    reader = open_gguf(gguf)

    def read(name: str) -> Any:
        field = reader.get_field(f"tokenizer.{name}")
        return None if field is None else field.contents()

    if read("ggml.pre") != "smollm":
        return None
    words, merges = (
        read("ggml.tokens"),
        [tuple(merge.split(" ")) for merge in read("ggml.merges")],
    )
    bpe = Tokenizer(
        models.BPE(
            vocab={word: number for number, word in enumerate(words)}, merges=merges
        )
    )
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), bytes_]
    )
    bpe.decoder = decoders.ByteLevel()
    control = [
        word
        for word, kind in zip(words, read("ggml.token_type"), strict=True)
        if kind == TokenType.CONTROL
    ]
    bpe.add_special_tokens(
        [AddedToken(word, normalized=False, special=True) for word in control]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=words[read("ggml.bos_token_id")],
        eos_token=words[read("ggml.eos_token_id")],
        unk_token=words[read("ggml.unknown_token_id")],
        pad_token=words[read("ggml.padding_token_id")],
        chat_template=read("chat_template"),
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
