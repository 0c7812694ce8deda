"""What sublayers are chosen by and repairs fitted to, and what that keeps of what
people serve: one size, other texts.

    python benchmarks/serving/mix.py --data DATA --out results/mix   # an hour on 2 cores
    python benchmarks/serving/mix.py --data DATA --out results/mix --sets attention:8 block:4 --texts wiki+c4 mix
    python benchmarks/serving/mix.py --data DATA --out /tmp/look --windows 8 --limit 4 --texts prose mix   # a look
    python benchmarks/serving/mix.py --data DATA --out results/qwen --model MODEL.gguf --sets block:2 --texts wiki mix \
        --tasks passkey answers gsm8k gym_letter_counting --rounds 15   # answers to questions, and times
    python benchmarks/serving/mix.py --data DATA --out results/more --model MODEL.gguf --windows 8 --questions 96 \
        --sets published:qwen2.5-coder-1.5b-block-1-by-mix healed --tasks gsm8k   # plans that were found before

A set is one that is named here, or of a kind and count: then it is chosen by each text,
as `notall search` does, and repaired on the same one. Each repair is fitted to as many
windows of 512 tokens, of one text or of several in turn; with `--minutes` it is then
trained on them as well. Each is judged on items and texts that nothing was fitted to.
Called again with the same --out, it goes on. `gsm8k` asks its test questions in the
model's chat template, without examples; the last number of an answer counts. Times are
of skipping alone: what a repair adds to them is nothing. Take them where nothing else
runs. DATA holds `wikitext2/wiki.train.first1MB.txt`, `wikitext2/wiki.test.raw`,
`c4/sample300.jsonl` and `gsm8k/test.jsonl`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from notall import (
    Plan,
    RepairedPlan,
    SearchConfig,
    choose_plan,
    evaluate,
    heal,
    load,
    repair,
)
from notall.choosing.budget import by_count
from notall.choosing.objective import build_objective
from notall.evaluation.harness import run_tasks
from notall.evaluation.limits import Limits
from notall.evaluation.tasks import TaskShelf
from notall.experiments.options.plan import read_plan, space_of
from notall.experiments.options.text import TextOptions
from notall.experiments.search.options import WITH_RETRIEVAL
from notall.measuring.speed import machine, time_plans
from notall.models.names import USAGE_MIX
from notall.models.texts import fields, read_file
from notall.options import Workload
from notall.repairing.fit_texts import FitTexts
from notall.repairing.texts import RepairTexts
from notall.repairing.train_config import TrainConfig
from notall.results.facts import DELTA_NLL, KL, SPEEDUPS, Quality, Recovery, Times
from notall.results.provenance import this_run
from notall.results.record import Fact
from notall.results.table import Column, number, table, with_interval, within, words
from notall.results.terminal import print_table
from notall.running.generating import as_asked

SETS = {
    "a8": (
        "attn.6 attn.7 attn.8 attn.12 attn.17 attn.22 attn.26 attn.29"
    ),  # found by KL on text
    "b4": "attn.14 mlp.14 attn.16 mlp.16 attn.17 mlp.17 attn.18 mlp.18",
}
TASKS = ["passkey", "retrieval", "answers"]
GSM8K, NOTHING, PUBLISHED = "gsm8k", "nothing: skipped", "published:"
# A task of the harness: the last number of an answer counts, without commas and zeros
# behind a point. `gsm8k` is scored by the leaderboard's filter, whose name this one
# has.
QUESTIONS = {
    "task": f"local_{GSM8K}",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{number}}",
    "num_fewshot": 0,
    "generation_kwargs": {"until": [], "max_gen_toks": 320, "do_sample": False},
    "filter_list": [
        {
            "name": "strict-match",
            "filter": [
                {
                    "function": "regex",
                    "regex_pattern": r"-?[0-9][0-9,]*(?:\.[0-9]+)?",
                    "group_select": -1,
                },
                {"function": "take_first"},
            ],
        }
    ],
    "metric_list": [
        {
            "metric": "exact_match",
            "aggregation": "mean",
            "higher_is_better": True,
            "regexes_to_ignore": [",", r"\.0*$"],
        }
    ],
}


class Kept(Fact):
    """Of one set and one text it was fitted to, what is kept of a task, or lost on a
    text.
    """

    set: str
    fitted: str
    judged: str
    metric: str | None = None  # of a task
    quality: Quality | None = None
    recovery: Recovery | None = None
    times: Times | None = None
    value: float | None = None
    dense: float | None = None
    tokens: int


COLUMNS: tuple[Column[Kept], ...] = (
    words("set", lambda one: one.set),
    words("fitted to", lambda one: one.fitted),
    number("tokens", lambda one: one.tokens, ",d"),
    words("judged on", lambda one: one.judged),
    words("metric", lambda one: one.metric),
    *within((DELTA_NLL, KL), lambda one: one.quality),
    with_interval(
        "recovery", lambda one: one.recovery.interval if one.recovery else None
    ),
    number("value", lambda one: one.value),
    number("dense", lambda one: one.dense),
    number("items", lambda one: one.recovery.items if one.recovery else None, "d"),
    *within(SPEEDUPS, lambda one: one.times),
)


def questions(tokenizer: PreTrainedTokenizerBase, data: Path, folder: Path) -> Path:
    """A folder with GSM8K as a task of the harness, each question as the model is asked
    it.
    """
    file = data / "gsm8k/test.jsonl"
    content = read_file(file, "GSM8K's test questions")
    asked = [as_asked(tokenizer, one) for one in fields(file, content, "question")]
    numbers = [
        one.rpartition("####")[2].strip() for one in fields(file, content, "answer")
    ]
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        json.dumps({"prompt": prompt, "number": number})
        for prompt, number in zip(asked, numbers)
    ]
    (folder / "questions.jsonl").write_text("\n".join(rows), encoding="utf-8")
    task = QUESTIONS | {
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}}
    }
    (folder / "gsm8k.yaml").write_text(
        json.dumps(task), encoding="utf-8"
    )  # JSON is YAML
    return folder


def plan_named(names: str) -> Plan:
    found = [name.split(".") for name in names.split()]
    return Plan(
        *(
            [int(layer) for kind, layer in found if kind == wanted]
            for wanted in ("attn", "mlp")
        )
    )


def chosen(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wanted: str,
    text: str,
    windows: list[Tensor],
    out: Path,
) -> Plan:
    """As many of a kind as `wanted` says, chosen by some windows of a text."""
    path = out / f"chosen-{wanted.replace(':', '')}-{text}.json"
    if path.is_file():
        return Plan.load(path)
    kind, _, count = wanted.partition(":")
    space = space_of(model, kind)
    goal = build_objective(
        WITH_RETRIEVAL if USAGE_MIX in text.split("+") else "kl",
        model,
        tokenizer,
        windows,
    )
    budget = by_count(space, int(count))
    config = SearchConfig(provenance={"text": text, "objective": goal.name})
    folder = path.with_suffix(".search")
    found = choose_plan(
        model, "search", space, budget, windows, goal, config, out=folder
    )
    tokens = sum(batch.inputs["input_ids"].numel() for batch in goal.batches)
    told = {
        "chosen": wanted,
        "by": text,
        "objective": goal.name,
        "tokens": tokens,
        **found.spent.model_dump(),
    }
    print(told)
    path.with_suffix(".spent.json").write_text(json.dumps(told), encoding="utf-8")
    found.plan.save(path)
    return found.plan


def telling(*told: object) -> None:
    print(*told, end="\r")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--sets",
        nargs="+",
        default=["a8"],
        help=f"{', '.join(SETS)}, such as attention:8, {PUBLISHED}NAME, a folder",
    )
    parser.add_argument(
        "--texts",
        nargs="+",
        default=["prose", "wiki+c4", "mix", "wiki+c4+answers+episodes"],
    )
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument(
        "--chosen-by",
        type=int,
        default=16,
        help="windows of them that sets are chosen by",
    )
    parser.add_argument(
        "--unrepaired",
        nargs="+",
        default=[],
        help="those of the texts whose sets are not repaired",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=None,
        help="CPU minutes that repaired sets are trained, too",
    )
    parser.add_argument(
        "--tasks", nargs="+", default=TASKS, help="of `notall tasks`, and gsm8k"
    )
    parser.add_argument("--limit", type=int, default=16, help="items of each task")
    parser.add_argument(
        "--questions", type=int, default=32, help="of gsm8k and of each generator"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=0,
        help="rounds in which prefill and decode are timed",
    )
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    files = {
        "wiki": asked.data / "wikitext2/wiki.train.first1MB.txt",
        "c4": asked.out / "c4-fitted.jsonl",
    }
    lines = (asked.data / "c4/sample300.jsonl").read_text(encoding="utf-8").splitlines()
    files["c4"].write_text("\n".join(lines[150:]), encoding="utf-8")
    (asked.out / "c4-judged.jsonl").write_text("\n".join(lines[:150]), encoding="utf-8")
    model, tokenizer = load(asked.model)
    plans: dict[tuple[str, str], tuple[Plan, int]] = {}
    for name in asked.sets:
        if name.startswith(PUBLISHED) or Path(name).is_dir():
            plans[Path(name).name, NOTHING] = read_plan(Path(name)), 0
            continue
        for text in asked.texts:
            sources = [str(files.get(part, part)) for part in text.split("+")]
            drawn = RepairTexts.draw(
                model,
                tokenizer,
                FitTexts(sources, sequences=asked.windows),
                training=bool(asked.minutes),
            )
            batches = drawn.together(8)
            if name in SETS:
                called, skipped = name, plan_named(SETS[name])
            else:
                called = f"{name} by {text}"
                skipped = chosen(
                    model,
                    tokenizer,
                    name,
                    text,
                    drawn.together(2)[: asked.chosen_by // 2],
                    asked.out,
                )
            plans[called, NOTHING] = skipped, 0
            if text in asked.unrepaired:
                continue
            folder = (
                asked.out
                / f"{called.replace(':', '').replace(' ', '-')}-{text}-{asked.windows}"
            )
            if not (folder / "plan.json").is_file():
                repair(model, skipped, batches, out=folder, progress=telling)
            plans[called, text] = (
                RepairedPlan.load(folder),
                sum(batch.numel() for batch in batches),
            )
            if asked.minutes:
                trained = folder.with_name(f"{folder.name}-trained")
                if not (trained / "plan.json").is_file():
                    config, stop = TrainConfig(minutes=asked.minutes), drawn.stop(4)
                    repaired = plans[called, text][0]
                    heal(
                        model,
                        repaired,
                        drawn.together(4),
                        stop,
                        config,
                        out=trained,
                        progress=telling,
                    )
                plans[called, f"{text}, trained"] = (
                    RepairedPlan.load(trained),
                    plans[called, text][1],
                )
    found = judged(model, tokenizer, plans, asked)
    told = {
        "machine": machine(model.device),
        "model": Path(asked.model).name,
        "windows": asked.windows,
    }
    told |= {"tasks": asked.tasks, "limit": asked.limit, "questions": asked.questions}
    told |= this_run("python", "benchmarks/serving/mix.py")
    told["searches"] = [
        json.loads(one.read_text())
        for one in sorted(asked.out.glob("chosen-*.spent.json"))
    ]
    told["skipped"] = {
        called: str(plan.unrepaired) for (called, _), (plan, _) in plans.items()
    }
    records = [json.dumps(told), *(one.model_dump_json() for one in found)]
    (asked.out / "kept.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
    print_table(table("what is kept", COLUMNS, found))


def judged(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plans: dict[tuple[str, str], tuple[Plan, int]],
    asked: argparse.Namespace,
) -> list[Kept]:
    """Each plan, by its set and the text it was fitted to, on texts and tasks."""
    found: list[Kept] = []
    every = [plan for plan, _ in plans.values()]
    for text in (asked.data / "wikitext2/wiki.test.raw", asked.out / "c4-judged.jsonl"):
        windows, _ = TextOptions(
            str(text), min(16, asked.windows // 4), 512, 4
        ).windows(model, tokenizer)
        for (key, (_, tokens)), quality in zip(
            plans.items(), evaluate(model, every, windows)
        ):
            found.append(
                Kept(
                    set=key[0],
                    fitted=key[1],
                    judged=text.stem,
                    quality=quality,
                    tokens=tokens,
                )
            )
    shelf = TaskShelf(questions(tokenizer, asked.data, asked.out / "tasks"))
    limits = Limits(
        asked.limit,
        {
            name: asked.questions
            for name in asked.tasks
            if name == GSM8K or "gym_" in name
        },
    )
    jobs = [
        shelf.build(name, None, limits.of(name)) for name in shelf.names(asked.tasks)
    ]
    for result in run_tasks(model, tokenizer, every, jobs, folder=asked.out / "judged"):
        (key, (_, tokens)), score = list(plans.items())[result.number], result.score
        one = Kept(
            set=key[0],
            fitted=key[1],
            judged=score.task,
            metric=score.usual_metric,
            tokens=tokens,
        )
        scores = {
            "recovery": score.recovery,
            "value": score.value,
            "dense": score.value - score.delta,
        }
        found.append(one.model_copy(update=scores))
    if asked.rounds:
        skipped = {
            name: plan for (name, _), (plan, tokens) in plans.items() if not tokens
        }
        times = time_plans(
            model,
            skipped,
            Workload(prompt_tokens=512, generation_tokens=32, rounds=asked.rounds),
        )
        parts = [(name, times[name]) for name in skipped]
        found += [
            Kept(set=name, fitted=NOTHING, judged="speed", times=one, tokens=0)
            for name, one in parts
        ]
    return found


if __name__ == "__main__":
    main()
