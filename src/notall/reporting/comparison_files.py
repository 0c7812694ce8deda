"""A comparison of criteria as files that people open: a table in Markdown, and the front as a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..records.comparison import ComparisonRecord
from .extras import FIGURES, installed


def write_comparison(records: Sequence[ComparisonRecord], out: Path, title: str) -> None:
    """The table, `out/table.md`, and with the extra `report` the front, `out/front.png`, .svg and .html.

    Raises `UsageError` as plots do.
    """
    rows = [record.row() for record in records]
    (out / "table.md").write_text(comparison_table(rows), encoding="utf-8")
    if not installed(*FIGURES):
        return
    from . import plots

    plots.save(plots.front_chart(rows, title), out / "front")


def comparison_table(records: Sequence[dict[str, Any]]) -> str:
    """The comparison in Markdown, a part for each space and count, what loses least first.

    "On its own text" is what the objective rises by on the calibration text, "run in full" how many forward passes the
    evaluations would be without shared states.
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["space"], record["count"]), []).append(record)
    tasks = list(dict.fromkeys(name for record in records for name in record["tasks"]))
    timed = all("speedup_decode" in record for record in records)
    head = [*["criterion", "by", "NLL added ± s.e.", "KL", "top-1"], *tasks]
    head += ["on its own text", "evaluations", "forward passes", "run in full", "CPU s"]
    head += ["decode speedup"] if timed else []
    lines = []
    for (space, count), group in groups.items():
        lines += [f"\n### {count} of {space}\n", _line(head), _line(["---", "---", *["---:"] * (len(head) - 2)])]
        for record in sorted(group, key=lambda r: r["delta_nll"] if r["delta_nll"] is not None else math.inf):
            cells = [record["criterion"], f"{record['aim']}, {record['calibration_tokens']:,} tokens"]
            cells += [f"{record['delta_nll']:.3f} ± {record['delta_nll_se']:.3f}", f"{record['kl']:.3f}"]
            cells += [f"{record['top1_agreement']:.2f}"]
            cells += [f"{record['tasks'][t]['value']:.3f} ({record['tasks'][t]['delta']:+.3f} "
                      f"± {record['tasks'][t]['delta_stderr']:.3f})" for t in tasks]  # fmt: skip
            rise = record["calibration_delta"]
            cells += ["" if rise is None else f"{rise:+.3f}", f"{record['evaluations']:,}"]
            cells += [f"{record['forwards']:,.1f}", f"{record['forwards_in_full']:,.1f}", f"{record['seconds']:,.0f}"]
            cells += [f"{record['speedup_decode']:.2f}"] if timed else []
            lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
