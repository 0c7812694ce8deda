"""A tiny model with a tokenizer of bytes, as a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from families import family


def save_tiny_checkpoint(path: Path, *, of: str = "llama", **config: Any) -> Path:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *letters])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=[
            "input_ids",
            "attention_mask",
        ],  # transformers 4 would add token types
    ).save_pretrained(path)
    family(of).build(vocab_size=len(vocabulary), **config).save_pretrained(path)
    return path
