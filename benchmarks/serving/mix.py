"""What a repair is fitted to, and what it keeps of what people serve: one set of sublayers, one size, other texts.

    python benchmarks/serving/mix.py --data DATA --out results/mix   # an hour on 2 cores
    python benchmarks/serving/mix.py --data DATA --out /tmp/look --windows 8 --limit 4 --texts prose mix   # a look

Each repair is fitted to as many windows of 512 tokens, of one text or of several in turn; each is judged on items and
texts that nothing was fitted to. Called again with the same --out, it goes on.
DATA holds `wikitext2/wiki.train.first1MB.txt`, `wikitext2/wiki.test.raw` and `c4/sample300.jsonl`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from notall import Plan, RepairedPlan, evaluate, load, repair
from notall.evaluation.harness import run_tasks
from notall.evaluation.tasks import TaskShelf
from notall.experiments.options import TextOptions
from notall.measuring.speed import machine
from notall.repairing.texts import RepairTexts
from notall.results.facts import DELTA_NLL, KL, Quality, Recovery
from notall.results.record import Fact
from notall.results.table import number, table, with_interval, within, words
from notall.results.terminal import print_table

SETS = {
    "a8": "attn.6 attn.7 attn.8 attn.12 attn.17 attn.22 attn.26 attn.29",  # found by KL on text
    "b4": "attn.14 mlp.14 attn.16 mlp.16 attn.17 mlp.17 attn.18 mlp.18",
}
TASKS = ["passkey", "retrieval", "answers"]


class Kept(Fact):
    """Of one set and one text it was fitted to, what is kept of a task, or lost on a text."""

    set: str
    fitted: str
    judged: str
    quality: Quality | None = None
    recovery: Recovery | None = None
    value: float | None = None
    dense: float | None = None
    tokens: int


COLUMNS = (
    words("set", lambda one: one.set),
    words("fitted to", lambda one: one.fitted),
    number("tokens", lambda one: one.tokens, ",d"),
    words("judged on", lambda one: one.judged),
    *within((DELTA_NLL, KL), lambda one: one.quality),
    with_interval("recovery", lambda one: one.recovery.interval if one.recovery else None),
    number("value", lambda one: one.value),
    number("dense", lambda one: one.dense),
    number("items", lambda one: one.recovery.items if one.recovery else None, "d"),
)


def plan_named(names: str) -> Plan:
    found = [name.split(".") for name in names.split()]
    return Plan(*([int(layer) for kind, layer in found if kind == wanted] for wanted in ("attn", "mlp")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sets", nargs="+", default=["a8"], choices=SETS)
    parser.add_argument("--texts", nargs="+", default=["prose", "wiki+c4", "mix", "wiki+c4+answers+episodes"])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--limit", type=int, default=16)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    files = {"wiki": asked.data / "wikitext2/wiki.train.first1MB.txt", "c4": asked.out / "c4-fitted.jsonl"}
    lines = (asked.data / "c4/sample300.jsonl").read_text(encoding="utf-8").splitlines()
    files["c4"].write_text("\n".join(lines[150:]), encoding="utf-8")
    (asked.out / "c4-judged.jsonl").write_text("\n".join(lines[:150]), encoding="utf-8")
    model, tokenizer = load(asked.model)
    plans: dict[tuple[str, str], tuple[Plan, int]] = {}
    for name in asked.sets:
        skipped = plan_named(SETS[name])
        plans[name, "nothing: skipped"] = skipped, 0
        for text in asked.texts:
            sources = [str(files.get(part, part)) for part in text.split("+")]
            folder = asked.out / f"{name}-{text}-{asked.windows}"
            drawn = RepairTexts.draw(model, tokenizer, sources, sequences=asked.windows)
            batches = drawn.together(8)
            if not (folder / "plan.json").is_file():
                repair(model, skipped, batches, out=folder, progress=lambda *told: print(*told, end="\r"))
            plans[name, text] = RepairedPlan.load(folder), sum(batch.numel() for batch in batches)
    found: list[Kept] = []
    for judged in (asked.data / "wikitext2/wiki.test.raw", asked.out / "c4-judged.jsonl"):
        windows, _ = TextOptions(str(judged), 16, 512, 4).windows(model, tokenizer)
        for (key, (_, tokens)), quality in zip(
            plans.items(), evaluate(model, [plan for plan, _ in plans.values()], windows)
        ):
            found.append(Kept(set=key[0], fitted=key[1], judged=judged.stem, quality=quality, tokens=tokens))
    shelf = TaskShelf()
    jobs = [shelf.build(name, None, asked.limit) for name in shelf.names(TASKS)]
    results = run_tasks(model, tokenizer, [plan for plan, _ in plans.values()], jobs, folder=asked.out / "judged")
    for result in results:
        (key, (_, tokens)), score = list(plans.items())[result.number], result.score
        one = Kept(set=key[0], fitted=key[1], judged=score.task, tokens=tokens, recovery=score.recovery)
        found.append(one.model_copy(update={"value": score.value, "dense": score.value - score.delta}))
    told = {"machine": machine(model.device), "model": asked.model, "windows": asked.windows, "limit": asked.limit}
    records = [json.dumps(told), *(one.model_dump_json() for one in found)]
    (asked.out / "kept.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
    print_table(table("what is kept", COLUMNS, found))


if __name__ == "__main__":
    main()
