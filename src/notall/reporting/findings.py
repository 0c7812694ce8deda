"""What the page says of a folder in words: a sentence for each plan, and the figures to see first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from ..records.claims import Verdict
from ..records.columns import Row
from ..records.measured import State
from ..records.record import DELTA_NLL, PERPLEXITY, SPEEDUPS, SPENT, counted
from .folder import Folder
from .plots import front
from .rows import name_of, sublayers, way_of

MOST_CARDS = 5


@dataclass(frozen=True)
class Finding:
    """A card."""

    title: str
    figure: str
    unit: str
    text: str


def first_plan(folder: Folder) -> int:
    """The plan to begin with: the one that a search chose last, else what loses least, as far as that is known."""
    lost = [(row["delta_nll"], plan) for plan, row in enumerate(folder.records) if _lost(row)]
    last = max(len(folder.plans) - 1, 0)
    return last if folder.kind == "search" else min(lost, default=(0, last))[1]


def told(record: Row) -> str:
    """One sentence of a plan's figures."""
    count = len(sublayers(record))
    parts = [f"{count} sublayer{'s' if count > 1 else ''} skipped" if count else "nothing is skipped"]
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
    if claims := folder.others.get("claims"):
        return _of_claims(claims)
    return _of_repair(folder.others.get("measured", ()))


def _of_claims(claims: Sequence[Row]) -> list[Finding]:
    """What became of the paper's claims: a card a verdict."""
    verdicts: dict[str, list[str]] = {verdict: [] for verdict in get_args(Verdict)}
    for row in claims:
        verdicts[row["verdict"]].append(row["claim"])
    return [
        Finding(verdict.capitalize(), f"{len(names)} of {len(claims)}", "claims of the paper", "; ".join(names))
        for verdict, names in verdicts.items()
        if names
    ]


def _of_sweep(folder: Folder) -> list[Finding]:
    """Of the dense model, of what loses least, of what is fastest, of the front."""
    dense = next((record for record in folder.records if record["variant"] == "dense"), None)
    skipping = [record for record in folder.records if _lost(record)]
    if not dense or not skipping:
        return []
    least = folder.records[first_plan(folder)]
    fastest = max(skipping, key=lambda record: record["speedup_decode"])
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
        Finding(
            "Loses least",
            f"{least['delta_nll']:+.2f}",
            "nats a token",
            f"{name_of(least)}; decodes {least['speedup_decode']:.2f}×",
        ),
        Finding(
            "Fastest",
            f"{fastest['speedup_decode']:.2f}×",
            SPEEDUPS[0].heading,
            f"{name_of(fastest)}; {fastest['delta_nll']:+.2f} nats a token",
        ),
        Finding(
            "On the front",
            f"{len(on_front)} of {len(skipping)}",
            "plans",
            "no other plan is both faster and better: " + ", ".join(named[:5]) + (" …" if len(named) > 5 else ""),
        ),
    ]


def _of_comparison(records: Sequence[Row]) -> list[Finding]:
    """What loses least, and what is next, at the largest count of each space: where the ways to choose differ most."""
    largest: dict[str, int] = {}
    for record in records:
        largest[record["space"]] = max(record["count"], largest.get(record["space"], 0))
    found = []
    for space, count in list(largest.items())[:MOST_CARDS]:
        asked = [row for row in records if (row["space"], row["count"]) == (space, count) and _lost(row)]
        ranked = sorted(asked, key=lambda row: row["delta_nll"])
        if ranked:
            found.append(_least(ranked, f"Loses least: {count} {space}"))
    return found


def _least(ranked: Sequence[Row], title: str) -> Finding:
    best, *rest = ranked
    text = f"{way_of(best)}, {best['forwards']:,.1f} forward passes to find"
    if rest:
        text += f"; next, {_loss(rest[0])}: {way_of(rest[0])}"
    return Finding(title, f"{best['delta_nll']:+.2f}", f"{_error(best)} nats a token", text)


def _of_search(record: Row) -> list[Finding]:
    """What was chosen last: how much of it, what it costs, what it saves, what it took."""
    found = [
        Finding("Skips", str(len(sublayers(record))), "sublayers", f"{counted(record['plan'])}; {record['chosen']}")
    ]
    if _lost(record):
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


def _of_repair(measured: Sequence[Row]) -> list[Finding]:
    """For each text what is lost in the end, and what was before."""
    texts: dict[str, dict[str, Row]] = {}
    for row in measured:
        if _lost(row):
            texts.setdefault(row["text"], {})[row["model"]] = row
    found = []
    for text, rows in list(texts.items())[:MOST_CARDS]:
        *before, after = sorted(rows.values(), key=lambda row: get_args(State).index(row["model"]))
        told = "; ".join([after["model"], *(f"{_loss(row)} {row['model']}" for row in before)])
        found.append(Finding(text, f"{after['delta_nll']:+.2f}", f"{_error(after)} nats a token", told))
    return found


def _lost(record: Row) -> bool:
    """Whether something is skipped, and it is known what that costs in NLL."""
    return bool(sublayers(record)) and record.get("delta_nll") is not None


def _loss(record: Row) -> str:
    if record["delta_nll"] is None:
        return "an unknown loss"
    error = _error(record)
    return f"{record['delta_nll']:+.2f} nats a token" + (f" ({error})" if error else "")


def _error(record: Row) -> str:
    return "" if record["delta_nll_se"] is None else f"± {record['delta_nll_se']:.2f}"
