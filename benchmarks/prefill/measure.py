"""What the deepest blocks cost and save when they are skipped in the prompt alone:
text, checks, questions and times.

    python benchmarks/prefill/measure.py quality --data DATA --out OUT --model MODEL.gguf --blocks 7 9 13
    python benchmarks/prefill/measure.py quality --data DATA --out OUT --blocks 8 10 --tasks   # text alone
    python benchmarks/prefill/measure.py times --out OUT --model MODEL.gguf --blocks 7 9 13 --prompts 512 2048

`quality` judges each depth as it is, with keys and values refit, with `--minutes`
trained, and out of every token: behind the prompts of WikiText-2 test and C4. The
repaired ones answer checks, and GSM8K with three examples, greedy. Repairs are fitted
to windows of WikiText-2 train and of other documents of C4. `times` takes one run of
interleaved rounds and adds it to the file: nothing else may run then. Called again with
the same --out, both go on. DATA holds `wikitext2/wiki.train.first1MB.txt`,
`wikitext2/wiki.test.raw`, `c4/sample300.jsonl`, `gsm8k/train.jsonl` and
`gsm8k/test.jsonl`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from notall import (
    Plan,
    RepairedPlan,
    TrainConfig,
    deepest,
    evaluate,
    heal,
    load,
    locate,
    repair,
)
from notall.evaluation.diagnostics import check_passkey
from notall.evaluation.harness import run_tasks
from notall.evaluation.limits import Limits
from notall.evaluation.tasks import TaskShelf
from notall.experiments.options.text import TextOptions
from notall.measuring.speed import machine, time_plans
from notall.models.texts import fields, read_file
from notall.options import Workload
from notall.repairing.fit_texts import FitTexts
from notall.repairing.texts import RepairTexts
from notall.results.facts import Check, Quality, Recovery, Times
from notall.results.provenance import this_run
from notall.results.record import Fact

TASKS = [
    "retrieval",
    "answers",
    "gsm8k",
    "gym_letter_counting",
    "gym_basic_arithmetic",
    "gym_chain_sum",
]
CONTEXTS = (512, 1024, 2048, 4096)  # of passkeys
SHOTS = 3
JUDGED = 64  # tokens behind the prompt of a window, which are scored
SKIPPED, REFIT, TRAINED = "skipped", "refit", "trained"  # in the prompt alone
EVERY_TOKEN = (  # as many blocks out of every token, of which the last stays
    "every token"
)
# The number behind `####` counts, as the examples write it; an answer ends where the
# next question would begin.
QUESTIONS = {
    "task": "shown_gsm8k",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{number}}",
    "num_fewshot": 0,
    "generation_kwargs": {
        "until": ["Question:"],
        "max_gen_toks": 200,
        "do_sample": False,
    },
    "filter_list": [
        {
            "name": "strict-match",
            "filter": [
                {"function": "regex", "regex_pattern": r"#### (-?[0-9][0-9,]*)"},
                {"function": "take_first"},
            ],
        }
    ],
    "metric_list": [
        {
            "metric": "exact_match",
            "aggregation": "mean",
            "higher_is_better": True,
            "regexes_to_ignore": [","],
        }
    ],
}


class Judged(Fact):
    """How one plan does on a text or a task."""

    blocks: int
    state: str  # as it is, or repaired
    skipped: str
    judged: str
    metric: str | None = None
    quality: Quality | None = None
    recovery: Recovery | None = None
    value: float | None = None
    dense: float | None = None
    check: Check | None = None


class Timed(Fact):
    """Times of one run of interleaved rounds, at one length of prompts."""

    blocks: int
    prompt_tokens: int
    run: str
    times: Times


def questions(data: Path, folder: Path) -> Path:
    """A folder with GSM8K as a task of the harness, whose prompts show the first
    questions of its training set.
    """
    asked, answered = {}, {}
    for part in ("train", "test"):
        file = data / f"gsm8k/{part}.jsonl"
        content = read_file(file, "GSM8K")
        asked[part], answered[part] = (
            fields(file, content, "question"),
            fields(file, content, "answer"),
        )
    shown = [
        f"Question: {one}\nAnswer: {other}\n\n"
        for one, other in zip(asked["train"], answered["train"])
    ]
    start = "".join(shown[:SHOTS])
    rows = [
        json.dumps(
            {
                "prompt": f"{start}Question: {one}\nAnswer:",
                "number": other.rpartition("####")[2].strip(),
            }
        )
        for one, other in zip(asked["test"], answered["test"])
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "questions.jsonl").write_text("\n".join(rows), encoding="utf-8")
    task = QUESTIONS | {
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}}
    }
    (folder / "gsm8k.yaml").write_text(
        json.dumps(task), encoding="utf-8"
    )  # JSON is YAML
    return folder


def texts(asked: argparse.Namespace) -> tuple[list[str], list[Path]]:
    """Files to fit to and to judge on; of C4 the second and the first half."""
    lines = (asked.data / "c4/sample300.jsonl").read_text(encoding="utf-8").splitlines()
    fitted, judged = asked.out / "c4-fitted.jsonl", asked.out / "c4-judged.jsonl"
    fitted.write_text("\n".join(lines[150:]), encoding="utf-8")
    judged.write_text("\n".join(lines[:150]), encoding="utf-8")
    return [str(asked.data / "wikitext2/wiki.train.first1MB.txt"), str(fitted)], [
        asked.data / "wikitext2/wiki.test.raw",
        judged,
    ]


def tails(model: PreTrainedModel, asked: argparse.Namespace) -> dict[int, Plan]:
    """The deepest blocks, or their MLPs, by their count, skipped in the prompt alone."""
    structure = locate(model)
    return {
        count: deepest(
            structure,
            asked.kind,
            count=count,
            phase="prefill",
            last_tokens=asked.last_tokens,
        )
        for count in asked.blocks
    }


def states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: argparse.Namespace,
    fitted: list[str],
) -> dict[tuple[int, str], Plan]:
    """Each depth as it is, refit, and trained, where that is asked for."""
    drawn = RepairTexts.draw(
        model,
        tokenizer,
        FitTexts(
            [*fitted, *asked.more_texts], sequences=asked.windows, length=asked.window
        ),
        training=bool(asked.minutes),
    )
    structure, found = locate(model), dict[tuple[int, str], Plan]()
    for count, plan in tails(model, asked).items():
        found[count, EVERY_TOKEN] = deepest(
            structure, asked.kind, count=count, keep_last=True
        )
        found[count, SKIPPED] = plan
        folder = asked.out / f"{count}-refit"
        if not (folder / "plan.json").is_file():
            repair(model, plan, drawn.together(4), out=folder, progress=telling)
        found[count, REFIT] = running_last(RepairedPlan.load(folder), asked.last_tokens)
        if not asked.minutes or count not in (asked.trained_of or asked.blocks):
            continue
        trained = asked.out / f"{count}-trained"
        if not (trained / "plan.json").is_file():
            behind = asked.window - JUDGED if asked.train_as_judged else None
            config = TrainConfig(
                minutes=asked.minutes, rate=asked.rate, prompt_tokens=behind
            )
            heal(
                model,
                found[count, REFIT],
                drawn.together(2),
                drawn.stop(2),
                config,
                out=trained,
                progress=telling,
            )
        found[count, TRAINED] = RepairedPlan.load(trained)
    return found


def running_last(plan: RepairedPlan, tokens: int) -> RepairedPlan:
    """The plan with so many last tokens of the prompt whole; its keys and values are of
    the earlier ones.
    """
    return plan.model_copy(
        update={"prefill": plan.prefill.model_copy(update={"last_tokens": tokens})}
    )


def telling(*told: object) -> None:
    print(*told, end="\r")


def on_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plans: list[Plan],
    files: list[Path],
    asked: argparse.Namespace,
) -> Iterator[tuple[str, list[Quality]]]:
    for file in files:
        windows, _ = TextOptions(
            str(file), asked.judged_windows, asked.window, 4
        ).windows(model, tokenizer)
        yield (
            file.stem,
            evaluate(model, plans, windows, prompt_tokens=asked.window - JUDGED),
        )


def is_served(named: tuple[int, str], asked: argparse.Namespace) -> bool:
    """Whether tasks judge a plan, by its depth and state."""
    count, state = named
    if asked.tasks_of is None:
        return state in (REFIT, TRAINED)
    return f"{count}-{state}" in asked.tasks_of


def quality(asked: argparse.Namespace) -> None:
    asked.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(asked.model)
    fitted, files = texts(asked)
    plans = states(model, tokenizer, asked, fitted)
    served = {named: plan for named, plan in plans.items() if is_served(named, asked)}
    every, found = [*served.values()], []

    def line(
        number: int, of: dict[tuple[int, str], Plan] = served, **what: Any
    ) -> Judged:
        (count, state), plan = [*of.items()][number]
        return Judged(blocks=count, state=state, skipped=str(plan.unrepaired), **what)

    for name, qualities in (
        ()
        if not asked.judged_windows
        else on_texts(model, tokenizer, [*plans.values()], files, asked)
    ):
        found += [
            line(number, plans, judged=name, quality=one)
            for number, one in enumerate(qualities)
        ]
        written(asked, found, machine(model.device))
    if asked.tasks:
        shelf = TaskShelf(questions(asked.data, asked.out / "tasks"))
        names = ["shown_gsm8k" if name == "gsm8k" else name for name in asked.tasks]
        limits = Limits(
            asked.limit,
            {
                name: asked.questions
                for name in names
                if name.startswith(("shown_", "gym_"))
            },
        )
        jobs = [shelf.build(name, None, limits.of(name)) for name in shelf.names(names)]
        for result in run_tasks(
            model, tokenizer, every, jobs, folder=asked.out / "judged", progress=telling
        ):
            score = result.score
            scores: dict[str, Any] = {
                "recovery": score.recovery,
                "value": score.value,
                "dense": score.value - score.delta,
            }
            found.append(
                line(
                    result.number,
                    judged=score.task,
                    metric=score.usual_metric,
                    **scores,
                )
            )
            written(asked, found, machine(model.device))
    if asked.contexts:
        for checks in check_passkey(model, tokenizer, every, asked.contexts):
            found += [
                line(number, judged=one.check, check=one)
                for number, one in enumerate(checks)
            ]
    written(asked, found, machine(model.device))


def written(
    asked: argparse.Namespace, found: list[Judged], about: dict[str, object]
) -> None:
    header = {
        "machine": about,
        "model": Path(asked.model).name,
        **this_run("python", "benchmarks/prefill/measure.py"),
    }
    records = [json.dumps(header), *(one.model_dump_json() for one in found)]
    (asked.out / "quality.jsonl").write_text(
        "\n".join(records) + "\n", encoding="utf-8"
    )


def times(asked: argparse.Namespace) -> None:
    """One run: the original and each depth in turn, as they are: a repair adds a small
    matrix product to each.
    """
    model, _ = load(asked.model)
    plans = {}
    for count, plan in tails(model, asked).items():
        folder = asked.out / f"{count}-refit"
        is_refit = (folder / "plan.json").is_file()
        plans[str(count)] = (
            running_last(RepairedPlan.load(folder), asked.last_tokens)
            if is_refit
            else plan
        )
    asked.out.mkdir(parents=True, exist_ok=True)
    run = f"{date.today()}"
    with (asked.out / "times.jsonl").open("a", encoding="utf-8") as file:
        header = {
            "machine": machine(model.device),
            "model": Path(asked.model).name,
            **this_run("python", "benchmarks/prefill/measure.py"),
        }
        print(json.dumps(header), file=file)
        for tokens in asked.prompts:
            workload = Workload(
                prompt_tokens=tokens, generation_tokens=asked.new, rounds=asked.rounds
            )
            for name, one in time_plans(model, plans, workload).items():
                blocks = 0 if name == "dense" else int(name)
                line = Timed(blocks=blocks, prompt_tokens=tokens, run=run, times=one)
                print(line.model_dump_json(), file=file, flush=True)
                told = (
                    f"{one.prefill_ms.median:.0f} ms, {one.speedup_prefill.median:.3f}"
                )
                print(
                    tokens,
                    name,
                    told,
                    f"decode {one.speedup_decode.median:.3f}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["quality", "times"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--blocks", nargs="+", type=int, required=True, help="how many of the deepest"
    )
    parser.add_argument(
        "--kind", choices=["block", "mlp"], default="block", help="what of a block"
    )
    parser.add_argument("--last-tokens", type=int, default=1)
    parser.add_argument(
        "--window",
        type=int,
        default=512,
        help=f"tokens of a window; the last {JUDGED} are scored",
    )
    parser.add_argument(
        "--windows",
        type=int,
        default=32,
        help="that repairs are fitted to, of both texts together",
    )
    parser.add_argument(
        "--more-texts",
        nargs="+",
        default=[],
        help="to fit to, as many windows of each: parts of notall's mix, such as"
        " episodes",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=None,
        help="CPU minutes that refit keys and values are trained",
    )
    parser.add_argument(
        "--rate", type=float, default=TrainConfig().rate, help="of that training"
    )
    parser.add_argument(
        "--train-as-judged",
        action="store_true",
        help=f"the last {JUDGED} tokens of a window (default: its half)",
    )
    parser.add_argument(
        "--trained-of",
        nargs="+",
        type=int,
        help="how many blocks (default: as --blocks)",
    )
    parser.add_argument(
        "--judged-windows", type=int, default=16, help="of each text; 0: none"
    )
    parser.add_argument(
        "--tasks", nargs="*", default=TASKS, help="of `notall tasks`, and gsm8k"
    )
    parser.add_argument(
        "--tasks-of",
        nargs="+",
        metavar="BLOCKS-STATE",
        help="plans that tasks judge, such as 10-refit (default: repaired)",
    )
    parser.add_argument("--limit", type=int, default=40, help="items of each check")
    parser.add_argument(
        "--questions", type=int, default=100, help="of gsm8k and of each generator"
    )
    parser.add_argument(
        "--contexts",
        nargs="*",
        type=int,
        default=CONTEXTS,
        help="tokens before a passkey is asked for",
    )
    parser.add_argument("--prompts", nargs="+", type=int, default=[512, 2048])
    parser.add_argument(
        "--new", type=int, default=16, help="tokens generated behind a timed prompt"
    )
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    {"quality": quality, "times": times}[asked.what](asked)


if __name__ == "__main__":
    main()
