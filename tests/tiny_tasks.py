"""A tokenizer of bytes and a folder of tasks for the harness, one of each kind of
request, made where they are used.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from families import make_each_layer_matter

WORDS = (
    "the",
    "of",
    "river",
    "stone",
    "light",
    "and",
    "winter",
    "a",
    "green",
    "bird",
    "sings",
    "under",
    "old",
    "in",
)
MERGES = [
    ("t", "h"),
    ("th", "e"),
    ("i", "n"),
    ("e", "r"),
    ("Ġ", "a"),
    ("Ġ", "the"),
    ("e", "n"),
]


def byte_tokenizer(*, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """Bytes, with a few merges so that where a text is cut matters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, *("".join(pair) for pair in MERGES)]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=MERGES)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )


def tiny_llama(max_position_embeddings: int = 512) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=280,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_position_embeddings,
    )
    model = LlamaForCausalLM(config)
    make_each_layer_matter(model)
    return model.eval()


QUESTION = (
    "output_type: multiple_choice\ndoc_to_text: '{{question}}?'\ndoc_to_target: label\n"
)
LETTERED = (
    "{{question}}? A. {{choices[0]}} B. {{choices[1]}} C. {{choices[2]}} D."
    " {{choices[3]}} Answer:"
)
ACCURACY = "metric_list:\n  - metric: acc\n  - metric: acc_norm\n"

TASKS = {
    "tiny_choice": QUESTION + "doc_to_choice: choices\n" + ACCURACY,
    "tiny_letters": (
        QUESTION.replace("{{question}}?", LETTERED)
        + "doc_to_choice: [A, B, C, D]\n"
        + ACCURACY
    ),
    "tiny_text": (
        """
output_type: loglikelihood_rolling
doc_to_text: ''
doc_to_target: '{{text}}'
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
    ),
    "tiny_words": (
        """
output_type: generate_until
doc_to_text: '{{question}}:'
doc_to_target: '{{choices[0]}}'
generation_kwargs:
  until: ['e']
  max_gen_toks: 12
  do_sample: false
metric_list:
  - metric: exact_match
"""
    ),
}

GROUP = """
group: tiny_group
task: [tiny_choice, tiny_letters]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
  - metric: acc_norm
    weight_by_size: true
"""

NESTED = GROUP.replace("group: tiny_group", "group: tiny_nested").replace(
    "[tiny_choice, tiny_letters]", "[tiny_group]"
)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """The folder of a checkpoint, with a tokenizer."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_tasks(folder: Path, documents: int = 55) -> Path:
    """The tasks above, of `documents` each, the group of the first two, and a group of
    that group.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(3)

    def some(least: int, most: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))

    def document() -> str:
        choices = [some(1, 5) for _ in range(4)]
        fields = {
            "question": some(4, 9),
            "choices": choices,
            "label": draw.randrange(4),
            "text": some(30, 90),
        }
        return json.dumps(fields) + "\n"

    for split, count in (("train", 20), ("test", documents)):
        (folder / f"{split}.jsonl").write_text(
            "".join(document() for _ in range(count))
        )
    for name, body in TASKS.items():
        _write(folder, name, body, "test.jsonl")
    (folder / "tiny_group.yaml").write_text(GROUP)
    (folder / "tiny_nested.yaml").write_text(NESTED)
    return folder


def copy_task(folder: Path, name: str, new_name: str, data: str = "test.jsonl") -> None:
    """The task `name` again, under another name and with other documents."""
    _write(folder, new_name, TASKS[name], data)


def _write(folder: Path, name: str, body: str, data: str) -> None:
    files = f"    train: {folder / 'train.jsonl'}\n    test: {folder / data}\n"
    source = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n{files}training_split:"
        " train\ntest_split: test\n"
    )
    (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}{body}")


def run_tasks(model: Any, tokenizer: Any, plans: Any, tasks: Any, **how: Any) -> Any:
    """Load and build `tasks`, and evaluate each of `plans` on each of them."""
    from api import Limits, TaskShelf, harness

    shelf, limits = (
        TaskShelf.of(how.pop("task_path", None)),
        Limits(how.pop("limit", None)),
    )
    shots = how.pop("num_fewshot", None)
    jobs = [shelf.build(name, shots, limits.of(name)) for name in shelf.names(tasks)]
    return harness.run_tasks(model, tokenizer, plans, jobs, **how)
