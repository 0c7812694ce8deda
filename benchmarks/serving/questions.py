"""What plans keep of answers to questions, written by llama.cpp: many at once, so that
hundreds are affordable.

    python benchmarks/serving/questions.py --data DATA --model MODEL.gguf --out results/questions \
        --plans published:qwen2.5-coder-1.5b-block-1-by-mix plan.json --tasks gsm8k gym_letter_counting --questions 128

Each plan is exported to a GGUF file, whose remaining matrices are the original's own.
Questions are asked greedily, in the model's chat template, without examples: those of
GSM8K's test file, whose last number counts, and of generators of reasoning-gym, by
their verifiers. Recovery is paired by question. Called again with the same --out, it
goes on. DATA holds `gsm8k/test.jsonl`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from notall import Plan, export
from notall.engines.llamacpp import LlamaCpp, _complete
from notall.evaluation.checks import Doc, MadeTask, made
from notall.experiments.options.plan import read_plan
from notall.measuring.recovery import recovery_interval
from notall.measuring.speed import machine
from notall.measuring.statistics import mean_and_error
from notall.models.texts import fields, read_file
from notall.results import lines
from notall.results.facts import Recovery
from notall.results.provenance import this_run
from notall.results.record import Amount, Count, Fact
from notall.results.table import Column, number, table, with_error, with_interval, words
from notall.results.terminal import print_table
from notall.running.generating import as_asked
from notall.strict_json import Settings

NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?")
GSM8K, MOST, TOGETHER = "gsm8k", 320, 16
ORIGINAL = "nothing"


@dataclass(frozen=True)
class Question:
    prompt: str
    most: int  # tokens of an answer
    is_right: Callable[[str], bool]
    number: str | None  # that answers it, if one does


class Answer(Fact):
    """One answer of one plan."""

    plan: str
    task: str
    number: Count
    right: bool
    tokens: Count
    text: str


class Kept(Fact):
    """What a plan keeps of a task, and how long its answers are beside the
    original's.
    """

    plan: str
    skipped: str
    task: str
    right: Count
    by_last_number: Count | None = (
        None  # whatever the form of an answer, where a number is asked for
    )
    of: Count
    recovery: Recovery | None
    tokens: Amount
    tokens_more: float
    tokens_more_se: float


COLUMNS: tuple[Column[Kept], ...] = (
    words("plan", lambda one: one.plan),
    words("without", lambda one: one.skipped),
    words("task", lambda one: one.task),
    number("right", lambda one: one.right, "d"),
    number("by their last number", lambda one: one.by_last_number, "d"),
    number("of", lambda one: one.of, "d"),
    with_interval(
        "recovery", lambda one: one.recovery.interval if one.recovery else None
    ),
    words("0.95", lambda one: one.recovery.is_kept() if one.recovery else ""),
    number("tokens an answer", lambda one: one.tokens, ".0f"),
    with_error(
        "more than the original", lambda one: (one.tokens_more, one.tokens_more_se)
    ),
)


def plain(said: str) -> str:
    """A number without commas and zeros behind a point."""
    return re.sub(r"\.0*$", "", said.replace(",", ""))


def ends_with(number: str, text: str) -> bool:
    return [plain(one) for one in NUMBER.findall(text)[-1:]] == [plain(number)]


def questions(
    task: str, data: Path, count: int, tokenizer: PreTrainedTokenizerBase
) -> list[Question]:
    if task == GSM8K:
        file = data / "gsm8k/test.jsonl"
        content = read_file(file, "GSM8K's test questions")
        both = zip(fields(file, content, "question"), fields(file, content, "answer"))
        pairs = [(ask, said.rpartition("####")[2].strip()) for ask, said in both]
        found = [
            Question(ask, MOST, partial(ends_with, number), number)
            for ask, number in pairs
        ]
    else:
        check = made(task, count)
        answers = [str(doc["answer"]) for doc in check.docs]
        numbers = [one if NUMBER.fullmatch(one) else None for one in answers]
        found = [
            Question(doc["prompt"], doc["tokens"], partial(verified, check, doc), one)
            for doc, one in zip(check.docs, numbers)
        ]
    return [
        replace(one, prompt=as_asked(tokenizer, one.prompt)) for one in found[:count]
    ]


def verified(check: MadeTask, doc: Doc, text: str) -> bool:
    return bool(check.judge(doc, (text, ""))["exact_match"])


def answered(
    server: Any, tokenizer: PreTrainedTokenizerBase, asked: Question
) -> tuple[str, int]:
    """The greedy answer, and of how many tokens it is."""
    ids = tokenizer(asked.prompt, add_special_tokens=False)["input_ids"]
    request = {
        "prompt": ids,
        "max_tokens": asked.most,
        "temperature": 0,
        "cache_prompt": False,
    }
    answer = _complete(server, request)
    return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]


def answers_of(
    name: str,
    plan: Plan,
    asked: argparse.Namespace,
    lacking: Mapping[tuple[str, int], Question],
    tokenizer: Any,
) -> Iterator[Answer]:
    """The answers of a plan to the questions, by task and number, in their order."""
    with (
        TemporaryDirectory(dir=asked.out) as folder,
        ThreadPoolExecutor(TOGETHER) as pool,
    ):
        pruned = asked.model
        if plan:
            (pruned,) = export(
                str(asked.model), plan, "gguf", Path(folder) / "pruned", verify=False
            ).glob("*.gguf")
        longest = max(
            len(tokenizer(one.prompt)["input_ids"]) + one.most
            for one in lacking.values()
        )
        server = LlamaCpp(asked.threads)._server(pruned, longest, TOGETHER)
        said = pool.map(partial(answered, server, tokenizer), lacking.values())
        for ((task, number), question), (text, tokens) in zip(lacking.items(), said):
            right = question.is_right(text)
            yield Answer(
                plan=name,
                task=task,
                number=number,
                right=right,
                tokens=tokens,
                text=text,
            )


def kept(
    name: str,
    plan: Plan,
    asked: Sequence[Question],
    ours: Sequence[Answer],
    theirs: Sequence[Answer],
) -> Kept:
    right, base = ([float(one.right) for one in answers] for answers in (ours, theirs))
    numbers = [one.number for one in asked]
    last = [
        ends_with(number, one.text)
        for number, one in zip(numbers, ours)
        if number is not None
    ]
    more, more_se = mean_and_error(
        [one.tokens - other.tokens for one, other in zip(ours, theirs)]
    )
    return Kept(
        plan=name,
        skipped=str(plan),
        task=ours[0].task,
        right=int(sum(right)),
        by_last_number=sum(last) if None not in numbers else None,
        of=len(ours),
        recovery=Recovery.of(recovery_interval(right, base), len(ours)),
        tokens=fmean(one.tokens for one in ours),
        tokens_more=more,
        tokens_more_se=more_se,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--plans", nargs="+", default=[], help="files, or published:NAME"
    )
    parser.add_argument(
        "--tasks", nargs="+", default=[GSM8K], help="gsm8k, and gym_NAME"
    )
    parser.add_argument("--questions", type=int, default=128, help="of each task")
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count(),
        help="no more than cores that are free",
    )
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    told = (  # another model's answers are another file
        f"{asked.model.name} {asked.model.stat().st_size}"
    )
    file = asked.out / f"answers-{hashlib.sha256(told.encode()).hexdigest()[:8]}.jsonl"
    found: dict[str, dict[tuple[str, int], Answer]] = defaultdict(dict)
    for one in (Answer(**line) for line in lines.read_lines(file)):
        found[one.plan][one.task, one.number] = one
    tokenizer = AutoTokenizer.from_pretrained(
        asked.model.parent, gguf_file=asked.model.name
    )
    plans = {ORIGINAL: Plan()} | {
        Path(name).name.removesuffix(".json"): read_plan(Path(name))
        for name in asked.plans
    }
    every = {
        (task, number): question
        for task in asked.tasks
        for number, question in enumerate(
            questions(task, asked.data, asked.questions, tokenizer)
        )
    }
    for name, plan in plans.items():
        lacking = {
            key: question for key, question in every.items() if key not in found[name]
        }
        for answer in (
            answers_of(name, plan, asked, lacking, tokenizer) if lacking else ()
        ):
            lines.append(file, answer.model_dump(mode="json"))
            found[name][answer.task, answer.number] = answer
            print(
                f"{name}: {answer.task} {answer.number + 1}",
                end="\r",
                file=sys.stderr,
                flush=True,
            )
    rows = []
    for wanted in asked.tasks:
        keys = [key for key in every if key[0] == wanted]
        of = {name: [found[name][key] for key in keys] for name in plans}
        those = [every[key] for key in keys]
        rows += [
            kept(name, plan, those, of[name], of[ORIGINAL])
            for name, plan in plans.items()
        ]
    about: Settings = {
        **this_run("python", "benchmarks/serving/questions.py"),
        "machine": machine("cpu"),
        "model": asked.model.name,
        "together": TOGETHER,
        "threads": asked.threads,
    }
    records = [json.dumps(about), *(one.model_dump_json() for one in rows)]
    (asked.out / "kept.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
    print_table(table("what is kept of answers", COLUMNS, rows))


if __name__ == "__main__":
    main()
