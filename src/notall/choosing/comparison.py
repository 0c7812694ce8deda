"""Criteria side by side: what each skips at each budget, what that costs on held-out text, and what it took to find.

In stages, each of which goes on where it was stopped: every criterion chooses, all plans are scored together on the
held-out text, answer tasks together, are timed, and become a line each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..measuring.plan_times import Timed, time_plan
from ..measuring.quality import Scores as Losses
from ..measuring.quality import score, summarize
from ..plan import Plan
from ..progress import Progress, silent
from ..records import ledger
from ..running.footprint import footprint
from ..structure.anatomy import locate
from .budget import by_count
from .criteria import CRITERIA, Scores, Setting, choose, criterion, suits
from .criteria.setting import take
from .evaluator import Evaluator, Spent
from .objective import Objective
from .space import Space, plan_of

RESULTS, CHOICES, HELD_OUT, TIMES = "results.jsonl", "choices.jsonl", "held_out.jsonl", "times.jsonl"
DEAR = ("greedy", "evolution")  # criteria that evaluate many times as often as the search


@dataclass(frozen=True)
class Aim:
    """What a criterion goes by: an objective, and the calibration text, (batch, tokens) token ids each."""

    objective: Objective
    batches: Sequence[Tensor]


@dataclass(frozen=True)
class Row:
    """One question: what `criterion` skips, going by the aim of this name, to skip `count` of `space`."""

    criterion: str
    aim: str
    space: Space
    count: int

    @property
    def key(self) -> dict[str, Any]:
        return {"criterion": self.criterion, "aim": self.aim, "space": str(self.space), "count": self.count}

    @property
    def name(self) -> str:
        return " ".join(map(str, self.key.values()))


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-evaluation-harness to run every plan on; `limit` is in documents a task."""

    names: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase
    limit: int | None = None
    num_fewshot: int | None = None
    folder: Path | None = None


def rows_of(criteria: Sequence[str], aims: Sequence[str], spaces: Sequence[tuple[Space, Sequence[int]]]) -> list[Row]:
    """Every criterion at every count of every space that it can choose from; by each aim where it goes by one."""
    return [
        Row(name, aim, space, count)
        for space, counts in spaces
        for name in criteria
        for aim in (aims if criterion(name).measured else aims[:1])
        for count in counts
        if suits(name, space)
    ]


def compare_criteria(
    model: PreTrainedModel,
    rows: Sequence[Row],
    aims: dict[str, Aim],
    held_out: Sequence[Tensor],
    out: Path,
    provenance: dict[str, Any],
    *,
    tasks: Tasks | None = None,
    timed: Timed | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Choose, score, ask and time as `rows` say; one record a row, in `out/results.jsonl` too.

    Called again on the same folder it goes on where it stopped, and what was done of other rows stays. Raises
    `UsageError` when the folder holds work of other settings, is in use or cannot be written, and as `choose` does.
    """
    settings = provenance | {"seed": seed}
    with ledger.lock(out):
        told = _Told(progress, rows, held_out)
        choices = _choices(model, rows, aims, out, settings, seed, told)
        plans = {choice["skipped"]: plan_of(choice["skipped"].split()) for choice in choices}
        losses = _losses(model, plans, held_out, out, settings, told)
        answers = _answers(model, plans, tasks, out, told) if tasks else {}
        times = _times(model, plans, timed, out, settings, seed, told) if timed else {}
        told.at(1.0, "done")
        held = {_key(record): record for record in ledger.read(out / RESULTS)}
        records = []
        for choice in choices:
            skipped = choice["skipped"]
            plan = plans[skipped]
            record = {
                **choice,
                "plan": {"attention": list(plan.attention), "mlp": list(plan.mlp)},
                **asdict(summarize(losses[skipped], losses[""])),
                **asdict(footprint(model, plan)),
                "tasks": answers.get(skipped, {}),
                **times.get(skipped, {}),
                "provenance": settings | {"fingerprint": locate(model).fingerprint},
            }
            if held.get(_key(record)) != ledger.finite(record):
                ledger.append(out / RESULTS, record)
            records.append(record)
        return records


# --- choosing ---------------------------------------------------------------------------------------------------------


def _choices(
    model: PreTrainedModel,
    rows: Sequence[Row],
    aims: dict[str, Aim],
    out: Path,
    settings: dict[str, Any],
    seed: int,
    told: _Told,
) -> list[dict[str, Any]]:
    """What each row skips, taken from the folder where it is there."""
    held = {_key(line): line for line in ledger.read(out / CHOICES)}
    scored: dict[tuple[str, str, str], tuple[Scores, Spent]] = {}
    for row in rows:
        line = held.get(_key(row.key))
        if line:
            ledger.check_same(line["settings"], settings | {"by": _by(aims[row.aim])}, out)
            told.chose(row)
            continue
        held[_key(row.key)] = line = _choose(model, row, aims[row.aim], out, settings, seed, scored, told)
        ledger.append(out / CHOICES, line)
        told.chose(row)
    return [{name: value for name, value in held[_key(row.key)].items() if name != "settings"} for row in rows]


def _choose(
    model: PreTrainedModel,
    row: Row,
    aim: Aim,
    out: Path,
    settings: dict[str, Any],
    seed: int,
    scored: dict[tuple[str, str, str], tuple[Scores, Spent]],
    told: _Told,
) -> dict[str, Any]:
    log = None
    if criterion(row.criterion).measured:  # rows that go by the same share what they evaluate
        log = out / "evaluations" / f"{row.criterion}-{row.aim}.jsonl".replace(" ", "-").replace("/", "-")
    evaluator = Evaluator(model, aim.objective, log=log, settings=settings)
    setting = Setting(
        model, row.space, aim.batches, evaluator, seed, progress=lambda done, doing: told.choosing(row, done, doing)
    )
    budget = by_count(row.space, row.count)
    score_units = criterion(row.criterion).score
    rise: float | None = None
    if score_units:
        key = row.criterion, row.aim, str(row.space)
        if key not in scored:
            scored[key] = score_units(setting), evaluator.spent
        scores, spent = scored[key]
        chosen = take(setting, scores, budget)
    else:
        chosen, spent = choose(row.criterion, setting, budget), replace(evaluator.spent)
        if log:  # known already, so it costs nothing
            rise = evaluator.cost(chosen.skipped) - evaluator.cost(frozenset())
    return {
        **row.key,
        "skipped": " ".join(row.space.sorted(chosen.skipped)),
        "order": [list(unit) for unit in chosen.order],
        "calibration_tokens": sum(tokens.numel() for tokens in aim.batches),
        **vars(spent),
        "forwards": spent.executions / evaluator.forward,
        "forwards_in_full": spent.one_by_one / evaluator.forward,
        "calibration_delta": rise,
        "settings": settings | {"by": _by(aim)},
    }


def _by(aim: Aim) -> str:
    return f"{aim.objective.name} {aim.objective.digest()}"


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("criterion", "aim", "space", "count"))


# --- measuring --------------------------------------------------------------------------------------------------------


def _losses(
    model: PreTrainedModel,
    plans: dict[str, Plan],
    held_out: Sequence[Tensor],
    out: Path,
    settings: dict[str, Any],
    told: _Told,
) -> dict[str, Losses]:
    """The scores of the dense model ("") and of each plan on the held-out text; what lacks is computed together."""
    held: dict[tuple[int, str], dict[str, list[float]]] = {}
    settings = settings | {"held_out_tokens": sum(tokens.numel() for tokens in held_out)}
    for line in ledger.read(out / HELD_OUT):
        ledger.check_same(line["settings"], settings, out)
        held |= {(line["batch"], skipped): scores for skipped, scores in line["scores"].items()}
    for number, tokens in enumerate(held_out):
        lacking = [skipped for skipped in plans if skipped and (number, skipped) not in held]
        if lacking or (number, "") not in held:
            told.measuring(number, f"scoring {len(lacking)} plans on held-out text")
            found = score(model, [plans[skipped] for skipped in lacking], tokens)
            new = {skipped: asdict(scores) for skipped, scores in zip(["", *lacking], found)}
            ledger.append(out / HELD_OUT, {"batch": number, "scores": new, "settings": settings})
            held |= {(number, skipped): scores for skipped, scores in new.items()}
    totals = {skipped: Losses() for skipped in ("", *plans)}
    for skipped, total in totals.items():
        for number in range(len(held_out)):
            total.extend(Losses(**{n: [math.inf if v is None else v for v in values]
                                   for n, values in held[number, skipped].items()}))  # fmt: skip
    return totals


def _answers(
    model: PreTrainedModel, plans: dict[str, Plan], tasks: Tasks, out: Path, told: _Told
) -> dict[str, dict[str, Any]]:
    """Each plan's metric of each task, with its difference to the dense model, paired by document."""
    from ..evaluation.harness import run_tasks

    names = ["", *(skipped for skipped in plans if skipped)]
    found = run_tasks(
        model,
        tasks.tokenizer,
        [plans.get(skipped, Plan()) for skipped in names],
        tasks.names,
        num_fewshot=tasks.num_fewshot,
        limit=tasks.limit,
        task_path=tasks.folder,
        folder=out / "answers",
        progress=lambda task, done, total: told.at(0.95, f"{task}: {done} of {total} requests"),
    )
    by_plan: dict[str, dict[str, Any]] = {skipped: {} for skipped in names}
    for result in found:
        skipped = names[result.number]
        fields = ("value", "stderr", "delta", "delta_stderr", "p_value", "num_fewshot")
        by_plan[skipped][f"{result.task} {result.metric.partition(',')[0]}"] = {
            **{name: getattr(result, name) for name in fields},
            "documents": len(result.documents),
        }
    return by_plan


def _times(
    model: PreTrainedModel,
    plans: dict[str, Plan],
    timed: Timed,
    out: Path,
    settings: dict[str, Any],
    seed: int,
    told: _Told,
) -> dict[str, dict[str, Any]]:
    """Each plan's times in turn with the dense model; plans that leave as much of each kind are timed once."""
    settings = settings | {"timed": asdict(timed)}
    held: dict[str, dict[str, Any]] = {}
    for line in ledger.read(out / TIMES):
        ledger.check_same(line["settings"], settings, out)
        held[line["left"]] = line["times"]
    found = {}
    for skipped, plan in plans.items():
        left = f"{asdict(footprint(model, plan))}"
        if left not in held:
            told.at(0.98, f"timing {plan}")
            times = time_plan(model, plan, **asdict(timed), seed=seed)[-1]
            held[left] = {
                name: value for name, value in times.items() if name.startswith(("prefill", "decode", "speed"))
            }
            ledger.append(out / TIMES, {"left": left, "times": held[left], "settings": settings})
        found[skipped] = held[left]
    return found


class _Told:
    """How far a comparison is, in guessed forward passes over the calibration text."""

    def __init__(self, progress: Progress, rows: Sequence[Row], held_out: Sequence[Tensor]) -> None:
        self.progress, self.held_out = progress, max(len(held_out), 1)
        self.guesses = {row: _guess(row) for row in rows}
        self.total = 1.5 * sum(self.guesses.values())  # what is measured afterwards takes half as much again
        self.done = 0.0

    def choosing(self, row: Row, share: float, doing: str) -> None:
        self.progress(self.done + share * self.guesses[row], self.total, f"{row.name}: {doing}")

    def chose(self, row: Row) -> None:
        self.done += self.guesses[row]
        self.progress(self.done, self.total, row.name)

    def measuring(self, number: int, doing: str) -> None:
        self.at((2 + 0.8 * number / self.held_out) / 3, doing)

    def at(self, share: float, doing: str) -> None:
        self.progress(share * self.total, self.total, doing)


def _guess(row: Row) -> float:
    """Forward passes, about."""
    units = len(row.space.units)
    guesses = {
        "leave-one-out": units / 2,
        "greedy": units * row.count / 2,
        "evolution": 150,
        "search": 2 * row.count + 20,
    }
    return guesses.get(row.criterion, 1.0)


def compare_front(
    model: PreTrainedModel,
    space: Space,
    most: int,
    aim: Aim,
    held_out: Sequence[Tensor],
    out: Path,
    provenance: dict[str, Any],
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """The trade-off up to `most` of `space`, at four sizes, by all criteria but those that cost more than the search.

    Writes what `compare_criteria` does to `out`, and raises as it does.
    """
    step = 2 if str(space) == "portable" else 1
    counts = sorted({max(step, step * round(most * part / 4 / step)) for part in (1, 2, 3, 4)})
    name = aim.objective.name
    rows = rows_of([c for c in CRITERIA if c not in DEAR], [name], [(space, counts)])
    return compare_criteria(model, rows, {name: aim}, held_out, out, provenance, seed=seed, progress=progress)
