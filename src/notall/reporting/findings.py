"""What the page says of a folder in words: a sentence for each plan, and the figures to see first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from ..records.columns import Column, Row, is_number
from ..records.measured import State
from ..records.record import DELTA_NLL, PERPLEXITY, SPEEDUPS, SPENT, counted
from .folder import Folder
from .papers import became_of, in_words, standing_of
from .plots import front
from .rows import name_of, several, sublayers, way_of
from .sentences import joined
from .usable import fastest, is_known, is_usable, mildest

MOST_CARDS = 5
FASTEST, LARGEST = "Fastest usable", "Largest usable"


@dataclass(frozen=True)
class Finding:
    """A card."""

    title: str
    figure: str
    unit: str
    text: str


def first_plan(folder: Folder) -> int:
    """The plan to begin with: what a search chose last, else what the page's first sentence is about."""
    last = max(len(folder.plans) - 1, 0)
    best = None if folder.kind == "search" else fastest(folder.records) or mildest(folder.records)
    return next((plan for plan, row in enumerate(folder.records) if row is best), last)


def told(record: Row) -> str:
    """One sentence of a plan's figures."""
    count = len(sublayers(record))
    parts = [f"{several(count, 'sublayer')} skipped" if count else "nothing is skipped"]
    if count and "delta_nll" in record and "text" not in record:  # of a repair, the cards say it for each text
        parts.append(_loss(record))
    if count and "speedup_decode" in record:
        low, middle, high = (record[f"speedup_decode{end}"] for end in ("_low", "", "_high"))
        parts.append(f"decodes {middle:.2f} times as fast [{low:.2f} to {high:.2f}]")
    elif "decode_ms_per_token" in record:
        parts.append(f"{record['decode_ms_per_token']:.1f} ms a token")
    if record.get("order"):
        parts.append("skipped in this order: " + ", ".join("+".join(unit) for unit in record["order"]))
    return "; ".join(parts) + "."


def findings_of(folder: Folder) -> list[Finding]:
    """The cards of a folder."""
    if folder.kind == "sweep":
        return _of_sweep(folder)
    if folder.kind == "compare":
        return _of_comparison(folder.records)
    if folder.kind == "search":
        return _of_search(folder.records[-1])
    if folder.kind == "bench":
        return _of_bench(folder.records)
    if folder.of_paper:
        return _of_paper(folder)
    return _of_repair(folder.others.get("measured", ()))


def _of_sweep(folder: Folder) -> list[Finding]:
    """Of the dense model, of what loses least, of what is fastest of the usable, of the front."""
    dense = next((record for record in folder.records if record["variant"] == "dense"), None)
    skipping = [record for record in folder.records if is_known(record)]
    least = mildest(skipping)
    if not dense or not least:
        return []
    best = front([(1.0, 0.0), *((record["speedup_decode"], record["delta_nll"]) for record in skipping)])
    on_front = [record for record in skipping if (record["speedup_decode"], record["delta_nll"]) in best]
    named = [name_of(record).replace(", last layer kept", " kept") for record in on_front]
    return [
        Finding(
            "Dense model",
            PERPLEXITY.value(dense),
            PERPLEXITY.heading,
            f"{dense['decode_ms_per_token']:.0f} ms a token, {dense['params'] / 1e6:,.0f} million parameters",
        ),
        _fastest(skipping),
        Finding(
            "Loses least",
            f"{least['delta_nll']:+.2f}",
            "nats a token",
            f"{name_of(least)}; decodes {least['speedup_decode']:.2f}×",
        ),
        Finding(
            "On the front",
            f"{len(on_front)} of {len(skipping)}",
            "plans",
            "no other plan is both faster and better: " + ", ".join(named[:5]) + (" …" if len(named) > 5 else ""),
        ),
    ]


def _fastest(records: Sequence[Row]) -> Finding:
    """Of those that leave the model usable."""
    best = fastest(records)
    if best is None:
        told = "without any of these plans' sublayers, perplexity more than doubles or most first choices change"
        return Finding(FASTEST, "none", f"of {len(records)} plans", told)
    text = f"{name_of(best)}; {_loss(best)}"
    if "speedup_decode" not in best:
        return Finding(LARGEST, str(len(sublayers(best))), "sublayers left out", text)
    return Finding(FASTEST, f"{best['speedup_decode']:.2f}×", SPEEDUPS[0].heading, text)


def _of_comparison(records: Sequence[Row]) -> list[Finding]:
    """What is fastest of the usable, and what loses least at the largest usable count of each space."""
    found = [_fastest(known)] if (known := [record for record in records if is_known(record)]) else []
    for space in list(dict.fromkeys(record["space"] for record in known))[: MOST_CARDS - 1]:
        asked = [record for record in known if record["space"] == space]
        count = max(record["count"] for record in [*filter(is_usable, asked)] or asked)
        ranked = sorted((row for row in asked if row["count"] == count), key=lambda row: row["delta_nll"])
        found.append(_least(ranked, f"Loses least: {count} {space}"))
    return found


def _least(ranked: Sequence[Row], title: str) -> Finding:
    best, *rest = ranked
    text = f"{way_of(best)}, {best['forwards']:,.1f} forward passes to find"
    same = [row for row in rest if (row["plan"], row["delta_nll"]) == (best["plan"], best["delta_nll"])]
    other = next((row for row in rest if row not in same), None)
    if same:
        text += f"; the same set by {joined([way_of(row) for row in same])}"
    if other:
        text += f"; next, {_loss(other)}: {way_of(other)}"
    if not is_usable(best):
        text += "; no longer usable"
    return Finding(title, f"{best['delta_nll']:+.2f}", f"{_error(best)} nats a token", text)


def _of_search(record: Row) -> list[Finding]:
    """What was chosen last: how much of it, what it costs, what it saves, what it took."""
    found = [
        Finding("Skips", str(len(sublayers(record))), "sublayers", f"{counted(record['plan'])}; {record['chosen']}")
    ]
    if is_known(record):
        unit = f"{_error(record)} nats a token"
        found.append(Finding("Loses", f"{record['delta_nll']:+.2f}", unit, f"{DELTA_NLL.heading} on the held-out text"))
    if None not in (record["cost"], record["dense_cost"]):
        rise = record["cost"] - record["dense_cost"]
        text = f"{record['dense_cost']:.4f} dense, {record['cost']:.4f} with the plan, on the text that was chosen by"
        found.append(Finding("Objective", f"{rise:+.3f}", "", text))
    if "speedup" in record:
        spread = f"[{record['speedup_low']:.2f}, {record['speedup_high']:.2f}]"
        text = f"{spread} of the rounds; {record['predicted_speedup']:.2f}× was predicted"
        found.append(Finding("As fast", f"{record['speedup']:.2f}×", "measured", text))
    evaluations, forwards, seconds = SPENT
    text = ", ".join(f"{column.text(record)} {column.heading}" for column in (evaluations, seconds))
    text += "" if record["in_time"] else "; the time was up before the search was done"
    return [*found, Finding("Took", forwards.text(record), forwards.heading, text)]


def _of_bench(records: Sequence[Row]) -> list[Finding]:
    """How much faster the plan was that was timed last."""
    timed = [record for record in records if sublayers(record)]
    if not timed:
        return []
    row = timed[-1]
    told = f"without {counted(row['plan'])}; prompt {row['prompt_tokens']}, batch {row['batch_size']}"
    return [_speedup(column, row, told) for column in SPEEDUPS]


def _speedup(column: Column, row: Row, told: str) -> Finding:
    return Finding(column.heading.capitalize(), f"{column.value(row)}×", column.beside(row), told)


def _of_paper(folder: Folder) -> list[Finding]:
    """How many claims hold, and what became of the configuration that the first sentence is about."""
    standing, found = standing_of(folder), []
    if folder.claims:
        holds = sum(row["verdict"] == "holds" for row in folder.claims)
        rest = [row for row in folder.claims if row["verdict"] != "holds"]
        found.append(Finding("Claims that hold", f"{holds} of {len(folder.claims)}", "", became_of(rest)))
    key = standing.headline
    if key is None:
        return found
    if key in standing.times:
        row = standing.times[key]
        told = f"without {in_words(key)}; prompt {row['prompt_tokens']}, batch {row['batch_size']}"
        found += [_speedup(column, row, told) for column in SPEEDUPS]
    if key in standing.averages:
        change, error = standing.averages[key]
        told = f"without {in_words(key)}; the average of {several(standing.tasks, 'benchmark')}"
        found.append(Finding("Benchmarks", f"{100 * change:+.1f}", f"± {100 * error:.1f} points", told))
    if key in standing.nats:
        found.append(Finding("Long texts", f"{standing.nats[key]:+.2f}", "nats a token", f"without {in_words(key)}"))
    return found


def _of_repair(measured: Sequence[Row]) -> list[Finding]:
    """For each text what is lost in the end, and what was before."""
    texts: dict[str, dict[str, Row]] = {}
    for row in measured:
        if is_known(row):
            texts.setdefault(row["text"], {})[row["model"]] = row
    found = []
    for text, rows in list(texts.items())[:MOST_CARDS]:
        *before, after = sorted(rows.values(), key=lambda row: get_args(State).index(row["model"]))
        told = "; ".join(
            [f"{after['model']}{_beside(after)}", *(f"{_loss(row)} {row['model']}{_beside(row)}" for row in before)]
        )
        found.append(Finding(text, f"{after['delta_nll']:+.2f}", f"{_error(after)} nats a token", told))
    return found


def _loss(record: Row) -> str:
    if record["delta_nll"] is None:
        return "an unknown loss"
    error = _error(record)
    return f"{record['delta_nll']:+.2f} nats a token" + (f" ({error})" if error else "")


def _beside(record: Row) -> str:
    """What stands beside the nats."""
    kl, agreement = record.get("kl"), record.get("top1_agreement")
    told = [f"KL {kl:.2f}"] if is_number(kl) else []
    told += [f"{agreement:.0%} of first choices stay"] if is_number(agreement) else []
    return f" ({', '.join(told)})" if told else ""


def _error(record: Row) -> str:
    return f"± {error:.2f}" if is_number(error := record["delta_nll_se"]) else ""
