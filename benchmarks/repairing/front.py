"""What a decode speedup costs: skipped, repaired in closed form, and healed, from 1.1
to 1.5 times as fast as dense.

    python benchmarks/repairing/front.py --data DATA --times-only                    # first, alone on the machine
    python benchmarks/repairing/front.py --data DATA --threads 1 --heal 1.3          # hours
    python benchmarks/repairing/front.py --data DATA --threads 1 --heal 1.3 --train-tokens 786432   # an hour's healing
    python benchmarks/repairing/front.py --data DATA --speeds                        # last, alone again

What is skipped is chosen as it is, by KL; what is repaired is chosen by the KL that a
cheap repair leaves. Both go by what each sublayer takes of decoding. The speeds told
are measured, all plans in turn with the original model, with the weights that they have
then. Texts are those of methods.py beside this. Called again with the same --out, it
goes on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from healing import BATCH, STOP
from methods import LENGTH, LOSSES, load_asked, named, options_of, texts
from torch import Tensor

import notall
from notall import Plan
from notall.choosing.budget import Budget
from notall.choosing.choice import choose_plan
from notall.choosing.latency import (
    SublayerTimes,
    by_speedup,
    check_times,
    measure_times,
)
from notall.choosing.search_config import SearchConfig
from notall.choosing.space import Space
from notall.measuring.quality import evaluate
from notall.measuring.speed import compare_speeds, machine, speedup
from notall.options import Workload
from notall.repairing.healing import heal
from notall.repairing.methods import kept_repair
from notall.repairing.train_config import TrainConfig
from notall.results import lines
from notall.results.facts import Quality
from notall.results.ledger import read_records
from notall.results.provenance import Provenance
from notall.results.record import Fact, Quartiles
from notall.results.repairs import HealRecord
from notall.results.table import Column, inherited, number, table, words
from notall.results.terminal import print_table, progress_bar
from notall.running.skipping import footprint

SPEEDUPS = (1.1, 1.2, 1.3, 1.5)
DECODING = Workload(128, 512)  # the prompt is a hundredth of it
WAYS = {
    "as it is": 4,
    "after a repair": 16,
}  # windows to choose by: half of the latter are fitted to
STATES = {
    "skipped": "as it is",
    "repaired": "after a repair",
    "healed": "after a repair",
}  # by how it is chosen
# tokens, about all there are of both texts: training on more goes through them again
TEXT = 262144


class Measured(Quality):
    """What a plan for a speedup loses on a text, skipped, repaired or healed; of a
    healing also what it took.
    """

    faster: float
    state: str
    text: str
    plan: str
    model: str
    dtype: str
    tokens: int
    windows: int
    cpu_minutes: float | None = None
    train_tokens: int | None = None
    rate: float | None = None


class Speed(Fact):
    """How fast a plan decodes: the speedup's median and quartiles; `weights` is the
    share of the original model's.
    """

    faster: float
    chosen: str
    decode_ms: float
    speedup: float
    lower_quartile: float
    upper_quartile: float
    weights: float


COLUMNS: tuple[Column[Measured], ...] = (
    number("speedup asked for", lambda row: row.faster, ".2f"),
    words("model", lambda row: row.state),
    words("text", lambda row: row.text),
    *inherited(Measured, LOSSES),
    number("CPU min. of healing", lambda row: row.cpu_minutes, ".1f"),
    number("rate", lambda row: row.rate, "g"),
    words("plan", lambda row: row.plan),
)
SPEEDS: tuple[Column[Speed], ...] = (
    number("speedup asked for", lambda row: row.faster, ".2f"),
    words("chosen", lambda row: row.chosen),
    number("decode ms/token", lambda row: row.decode_ms, ".2f"),
    number("speedup", lambda row: row.speedup),
    number("lower quartile", lambda row: row.lower_quartile),
    number("upper quartile", lambda row: row.upper_quartile),
    number("of the original model's weights", lambda row: row.weights),
)


def main() -> None:
    options = options_of(__doc__)
    options.add_argument("--out", type=Path, default=Path("results/repair-front"))
    options.add_argument("--tokens", type=int, default=131072, help="to fit repairs to")
    options.add_argument(
        "--train-tokens", type=int, default=131072, help="to heal with"
    )
    options.add_argument(
        "--rate", type=float, default=TrainConfig.rate, help="of learning, to heal with"
    )
    options.add_argument(
        "--windows",
        type=int,
        default=32,
        help="of 512 tokens, of each text to measure on",
    )
    options.add_argument("--faster", nargs="+", type=float, default=list(SPEEDUPS))
    options.add_argument(
        "--heal",
        nargs="*",
        type=float,
        default=[],
        help="the speedups whose models are healed",
    )
    options.add_argument("--rounds", type=int, default=11)
    options.add_argument(
        "--times-only", action="store_true", help="what sublayers take, for later calls"
    )
    options.add_argument("--speeds", action="store_true", help="time what was chosen")
    asked = options.parse_args()
    model, tokenizer = load_asked(asked)
    space = notall.Space(notall.locate(model), "sublayer")
    times = kept_times(asked.out / "times.json", model, space)
    if asked.times_only:
        return
    drawn, held_out = texts(
        tokenizer, asked.data, asked.tokens + STOP * LENGTH, asked.windows
    )
    lesson, _ = texts(
        tokenizer, asked.data, min(asked.train_tokens, TEXT) + STOP * LENGTH, 1
    )
    front = Front(
        asked, model, space, times, torch.cat(drawn)[:-STOP], torch.cat(lesson)
    )
    settings, called = named(asked, "model", "dtype", "tokens", "windows")
    path = asked.out / f"results-{called}.jsonl"
    for faster in asked.faster:
        made = front.made(faster, healed=faster in asked.heal)
        known = {
            row.state
            for row in measured(path)
            if row.faster == faster and is_healed_as(asked, row)
        }
        lacking = {state: plan for state, plan in made.items() if state not in known}
        found: list[Measured] = []
        for text, windows in held_out.items() if lacking else ():
            for state, quality in zip(
                lacking, evaluate(model, [*lacking.values()], windows)
            ):
                about = {
                    "faster": faster,
                    "state": state,
                    "text": text,
                    "plan": " ".join(lacking[state].names),
                }
                spent = front.spent(faster) if state == "healed" else {}
                found.append(
                    Measured.model_validate(
                        quality.model_dump() | about | spent | settings
                    )
                )
        lines.append(path, *as_lines(found))
    rows = measured(path)
    rows.sort(
        key=lambda row: (
            row.faster,
            [*STATES].index(row.state),
            row.train_tokens or 0,
            row.text,
        )
    )
    title = (
        f"Repaired with {asked.tokens:,} tokens, measured on {asked.windows} x {LENGTH}"
        " of each"
    )
    print_table(table(title, COLUMNS, rows))
    if asked.speeds:
        timed = speeds(
            model, {faster: front.made(faster) for faster in asked.faster}, asked.rounds
        )
        lines.append(asked.out / f"speeds-{called}.jsonl", *as_lines(timed))
        place = machine(model.device)
        title = (
            f"Decoding after 128 tokens, {place['cpu']}, {place['threads']} threads,"
            f" {asked.dtype}"
        )
        print_table(table(f"{title}, {asked.rounds} rounds", SPEEDS, timed))


def measured(path: Path) -> list[Measured]:
    return [Measured(**line) for line in lines.read_lines(path)]


def as_lines(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    return [fact.model_dump(mode="json", exclude_unset=True) for fact in facts]


def is_healed_as(asked: Any, row: Measured) -> bool:
    """Whether a result is not of a healing, or of one that is asked for."""
    healing = (asked.train_tokens, asked.rate)
    rate = TrainConfig.rate if row.rate is None else row.rate
    return row.state != "healed" or (row.train_tokens, rate) == healing


def kept_times(path: Path, model: Any, space: Space) -> SublayerTimes:
    """What each sublayer takes of decoding: from a file, where it was measured."""
    if path.exists():
        held = json.loads(path.read_text())
        return SublayerTimes(DECODING, held["dense_ms"], held["sublayer_ms"])
    print(
        "timing the sublayers: nothing else should run on this machine",
        file=sys.stderr,
        flush=True,
    )
    times = corrected(model, space, measure_times(model, replace(DECODING, rounds=7)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"dense_ms": times.dense_ms, "sublayer_ms": dict(times.sublayer_ms)})
    )
    return times


def corrected(model: Any, space: Space, times: SublayerTimes) -> SublayerTimes:
    """Times that tell how fast the model is without 12 attentions and 5 MLPs, which is
    about 1.3x.
    """
    depth = len(space.structure.layers)
    plan = Plan(
        attention=[depth * place // 12 for place in range(12)],
        mlp=[depth * place // 5 for place in range(5)],
    )
    check = check_times(model, plan, times, rounds=11)
    told = (
        f"predicted {check.predicted_speedup:.3f}x, measured"
        f" {check.measured_speedup.median:.3f}x"
    )
    print(told, file=sys.stderr, flush=True)
    budget = by_speedup(space, times, check.predicted_speedup).corrected(check)
    return budget.times if budget else times


class Front:
    """What is chosen, repaired and healed for each speedup, from files of the folder
    where it is there.
    """

    def __init__(
        self,
        asked: Any,
        model: Any,
        space: Space,
        times: SublayerTimes,
        rows: Tensor,
        lesson: Tensor,
    ) -> None:
        self.asked, self.model, self.space, self.times = asked, model, space, times
        self.rows, self.lesson = rows, lesson

    def made(self, faster: float, healed: bool = False) -> dict[str, Plan]:
        plans = {
            state: self.chosen(faster, STATES[state])
            for state in ("skipped", "repaired")
        }
        fit = self.rows.split(8)
        print(f"{faster}x: repairing", file=sys.stderr, flush=True)
        plans["repaired"], _ = kept_repair(
            self.asked.out / "repairs", "refit", self.model, plans["repaired"], fit
        )
        if healed:
            batches, stop = (
                self.lesson[:-STOP].split(BATCH),
                self.lesson[-STOP:].split(BATCH),
            )
            batches *= self.asked.train_tokens // self.lesson[:-STOP].numel()
            print(f"{faster}x: healing", file=sys.stderr, flush=True)
            with progress_bar() as bar:
                out = self.healing(faster)
                config = TrainConfig(rate=self.asked.rate)
                plans["healed"] = heal(
                    self.model,
                    plans["repaired"],
                    batches,
                    stop,
                    config,
                    out=out,
                    progress=bar,
                )
        return plans

    def spent(self, faster: float) -> dict[str, float]:
        """What healing took: CPU minutes, and tokens of text."""
        seconds = read_records(self.healing(faster) / HealRecord.file, HealRecord)[
            -1
        ].seconds
        return {
            "cpu_minutes": seconds / 60,
            "train_tokens": self.asked.train_tokens,
            "rate": self.asked.rate,
        }

    def healing(self, faster: float) -> Path:
        at = "" if self.asked.rate == TrainConfig.rate else f"-at-{self.asked.rate:g}"
        return self.asked.out / f"healed-{faster:g}-with-{self.asked.train_tokens}{at}"

    def chosen(self, faster: float, way: str) -> Plan:
        """What the search finds; sets that it evaluated for one speedup are known for
        the next.
        """
        exact = by_speedup(self.space, self.times, faster)
        budget = Budget(
            exact.saves, exact.target, exact.description
        )  # not timed here: it is timed in the end
        about = Provenance(
            what={
                "model": Path(self.asked.model).name,
                "dtype": self.asked.dtype,
                "chosen": way,
            }
        )
        print(f"{faster}x: choosing {way}", file=sys.stderr, flush=True)
        with progress_bar() as bar:
            return choose_plan(
                *(
                    self.model,
                    "search",
                    self.space,
                    budget,
                    self.rows[: WAYS[way]].split(1),
                ),
                out=self.asked.out / f"chosen {way}".replace(" ", "-"),
                config=SearchConfig(
                    after_repair=way == "after a repair", provenance=about
                ),
                progress=bar,
            ).plan


def speeds(model: Any, made: dict[float, dict[str, Plan]], rounds: int) -> list[Speed]:
    """How fast each plan decodes, in turn with the original model: as it is chosen, or
    with its repaired weights.
    """
    plans = {
        (faster, STATES[state]): plan
        for faster, of in made.items()
        for state, plan in of.items()
    }
    entering = {"dense": partial(notall.skip, model, Plan())}
    entering |= {
        f"{faster:g} {way}": partial(notall.skip, model, plan)
        for (faster, way), plan in plans.items()
    }
    found = compare_speeds(model, entering, Workload(128, 32, rounds=rounds))
    dense, weights = (
        found["dense"].decode_samples_ms,
        footprint(model, Plan()).weight_bytes,
    )
    rows = []
    for (faster, way), plan in plans.items():
        timing = found[f"{faster:g} {way}"]
        ratio = speedup(dense, timing.decode_samples_ms)
        quartiles = {
            "speedup": ratio.median,
            "lower_quartile": ratio.low,
            "upper_quartile": ratio.high,
        }
        kept = footprint(model, plan).weight_bytes / weights
        decode_ms = Quartiles.of(timing.decode_samples_ms).median
        rows.append(
            Speed(
                faster=faster,
                chosen=way,
                decode_ms=decode_ms,
                **quartiles,
                weights=kept,
            )
        )
    return rows


if __name__ == "__main__":
    main()
