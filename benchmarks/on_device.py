"""The default model on a device and on the CPU: do both find the same, and what does
each take?

    python benchmarks/on_device.py --out results/gpu          # cuda, else what is here
    python benchmarks/on_device.py --model FOLDER --small     # a smoke test, anywhere

A step is a function of a `Bench`, listed in `STEPS`: it does one thing that notall
offers, and answers the number that devices are compared by. Each step is timed once,
after one call to warm up; memory is the most that torch allocated on the device. What a
device finds differs from the CPU by rounding: a number that is further off than `most`
is marked, and the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import notall
from notall import Plan, Space, TrainConfig
from notall.choosing.budget import by_count
from notall.measuring.speed import machine, time_plans
from notall.models.devices import resolve_device
from notall.options import Workload
from notall.results.table import in_bytes


@dataclass
class Bench:
    """A model on a device, and the text that all steps read: the same windows
    everywhere.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    small: bool
    plan: Plan = field(init=False)

    def __post_init__(self) -> None:
        self.plan = notall.deepest(
            notall.locate(self.model), "attention", 0.25, keep_last=True
        )

    @cached_property
    def windows(self) -> Tensor:
        """(windows, tokens) token ids, on the CPU."""
        count, length = (4, 32) if self.small else (16, 256)
        text = " ".join(topics[name] for name in sorted(topics))
        ids = self.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
        return ids[:, : count * length].view(count, length)

    @property
    def halves(self) -> tuple[list[Tensor], list[Tensor]]:
        """What is calibrated by, and what is measured on."""
        calibration, evaluation = self.windows.chunk(2)
        return list(calibration.split(4)), list(evaluation.split(4))


def evaluate(bench: Bench) -> float:
    """NLL added by the plan, nats per token."""
    return notall.evaluate(bench.model, [bench.plan], bench.halves[1])[0].delta_nll


def similarity(bench: Bench) -> float:
    """Mean cosine over the sublayers."""
    found = notall.measure_similarity(bench.model, bench.halves[0])
    return sum(one.cosine for one in found) / len(found)


def search(bench: Bench) -> float:
    """KL without the two attentions that the search takes, on its own text."""
    space = Space(notall.locate(bench.model), "attention")
    budget = by_count(space, 2)
    return notall.choose_plan(
        bench.model, "search", space, budget, bench.halves[0]
    ).cost


def repair(bench: Bench) -> float:
    """NLL added by the repaired plan."""
    repaired = notall.repair(bench.model, bench.plan, bench.halves[0])
    return notall.evaluate(bench.model, [repaired], bench.halves[1])[0].delta_nll


def heal(bench: Bench) -> float:
    """NLL added after a pass of recovery fine-tuning."""
    healed = notall.heal(bench.model, bench.plan, *bench.halves, TrainConfig())
    return notall.evaluate(bench.model, [healed], bench.halves[1])[0].delta_nll


def decode(bench: Bench) -> float:
    """How many times as fast as the original model the plan decodes: a device's own
    number.
    """
    workload = Workload(8, 2, rounds=1) if bench.small else Workload()
    times = time_plans(bench.model, {"plan": bench.plan}, workload)
    return times["plan"].speedup_decode.median


@dataclass(frozen=True)
class Step:
    run: Callable[[Bench], float]
    most: float | None = (
        None  # how far off the CPU's number it may be; None: not compared
    )

    @property
    def name(self) -> str:
        return self.run.__name__


STEPS = (
    Step(evaluate, 1e-3),
    Step(similarity, 1e-3),
    Step(search, 1e-2),
    Step(repair, 1e-2),
    Step(heal, 5e-2),
    Step(decode),
)


@dataclass(frozen=True)
class Found:
    step: str
    device: str
    value: float
    seconds: float
    peak_bytes: int | None  # of the device


def measured(step: Step, bench: Bench, device: torch.device) -> Found:
    on_cuda = device.type == "cuda"
    step.run(bench)  # kernels are chosen and loaded at their first use
    if on_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    value = step.run(bench)
    if on_cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) if on_cuda else None
    return Found(step.name, str(device), value, seconds, peak)


def table(found: list[Found]) -> tuple[str, bool]:
    """One row a step, and whether all devices agree."""
    names = list(dict.fromkeys(one.device for one in found))
    heads = [
        f"{name}: {what}" for name in names for what in ("finds", "seconds", "memory")
    ]
    rows = [
        f"| step | {' | '.join(heads)} | agree |",
        f"| --- |{' ---: |' * len(heads)} --- |",
    ]
    agree = True
    for step in STEPS:
        ours = [one for one in found if one.step == step.name]
        cells = [cell for one in ours for cell in _cells(one)]
        off = max(one.value for one in ours) - min(one.value for one in ours)
        is_same = step.most is None or off <= step.most
        agree = agree and is_same
        said = (
            "not compared"
            if step.most is None
            else "yes"
            if is_same
            else f"NO: {off:.2g} off"
        )
        rows.append(f"| {step.name} | {' | '.join(cells)} | {said} |")
    return "\n".join(rows), agree


def _cells(one: Found) -> tuple[str, str, str]:
    memory = "" if one.peak_bytes is None else in_bytes(one.peak_bytes)
    return f"{one.value:.4f}", f"{one.seconds:.2f}", memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--small", action="store_true", help="little text, for a smoke test"
    )
    parser.add_argument("--out", type=Path, default=Path("results/gpu"))
    asked = parser.parse_args()
    found = []
    devices = dict.fromkeys([torch.device("cpu"), resolve_device(asked.device)])
    for device in devices:
        model, tokenizer = notall.load(asked.model, dtype="float32", device=str(device))
        bench = Bench(model, tokenizer, asked.small)
        found += [measured(step, bench, device) for step in STEPS]
    shown, agree = table(found)
    asked.out.mkdir(parents=True, exist_ok=True)
    about = {"date": str(date.today()), "model": Path(asked.model).name}
    about |= {"machine": machine(*devices)}
    lines = [json.dumps({**vars(one), **about}) for one in found]
    (asked.out / "on_device.jsonl").write_text("\n".join(lines) + "\n")
    (asked.out / "on_device.md").write_text(shown + "\n")
    print(shown)
    if not agree:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
