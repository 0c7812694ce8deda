"""Checkpoints by GPTQ: the rivals of skipping in vLLM, calibrated as llm-compressor
does it, in eight and in four bits.

    make .venv-llmcompressor/.done
    .venv-llmcompressor/bin/python benchmarks/engines/gptq.py FOLDER [FOLDER ...] --data DATA --out results/gptq
    notall pareto MODEL --engine vllm --also results/gptq/NAME-gptq-w8a8 ...   # in an environment with vLLM

A FOLDER is a checkpoint, such as `notall export --to hf` writes; for one that brings
code give `--trust-remote-code`. Each is written twice: W8A8 has a scale per output
channel, and one per token of what comes in; W4A16 a scale per 64 weights of a row. Head
and embedding stay as they are. The text is half WikiText-2 train, half C4. A checkpoint
that is there is not written again. DATA holds `wikitext2/wiki.train.first1MB.txt` and
`c4/sample300.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from below_four_bits import texts_of
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

from notall.models.windows import token_batches

LENGTH = 512  # tokens of a window
# 64 divides the widths of the default model, which 128 does not.
GROUP = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": 64,
}
SCHEMES = {
    "w8a8": {"scheme": "W8A8"},
    "w4a16": {"config_groups": {"group_0": {"targets": ["Linear"], "weights": GROUP}}},
}


def quantise(folder: Path, scheme: str, asked: argparse.Namespace, out: Path) -> None:
    trusted = asked.trust_remote_code
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, trust_remote_code=trusted
    )
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=trusted
    )
    (texts, _), each = texts_of(asked.data), asked.windows // 2
    batches = (
        token_batches(tokenizer, text, sequences=each, length=LENGTH, batch_size=each)
        for text in texts
    )
    rows = [
        {"input_ids": row.tolist(), "attention_mask": [1] * LENGTH}
        for both in batches
        for row in both[0]
    ]
    recipe = GPTQModifier(ignore=["lm_head"], **SCHEMES[scheme])
    oneshot(
        model=model, tokenizer=tokenizer, dataset=Dataset.from_list(rows), recipe=recipe, max_seq_length=LENGTH,
        num_calibration_samples=len(rows), trust_remote_code_model=trusted,
    )  # fmt: skip
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--windows",
        type=int,
        default=128,
        help=f"of {LENGTH} tokens, of both texts together",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run a checkpoint's own modeling code",
    )
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=[*SCHEMES])
    asked = parser.parse_args()
    for folder in asked.folders:
        for scheme in asked.schemes:
            out = asked.out / f"{folder.name}-gptq-{scheme}"
            if (out / "config.json").is_file():
                continue
            started = time.process_time()
            quantise(folder, scheme, asked, out)
            print(
                json.dumps(
                    {
                        "checkpoint": out.name,
                        "cpu_seconds": round(time.process_time() - started),
                    }
                )
            )


if __name__ == "__main__":
    main()
