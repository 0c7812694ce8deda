"""Two pictures of what claims.py found: how far each claim is from its threshold, and
losses by text and by way.

python benchmarks/claims/picture.py OUT "SmolLM2-135M-Instruct" [OTHER "Gemma 3 270M"
...]   # folders, and their models

The pictures are written to the first folder; that of losses by text and by way is of
the first model alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import altair as alt
from bench import JUDGED
from claims import Answer

from notall.charts.style import GREY, INK, LIGHT, SPECTRUM, save, titled
from notall.results import lines

SHADES = {"holds": SPECTRUM[2], "inconclusive": SPECTRUM[7], "fails": SPECTRUM[1]}
FAR = 30  # half intervals: further away is drawn here
CHOSEN = re.compile(
    r"(?P<count>\d+) attention by (?P<way>\S+) on (?P<text>.+), seed (?P<seed>\d+)"
)


def distances(found: Mapping[str, list[Answer]]) -> alt.LayerChart:
    """Each claim's interval on each model, in half intervals from its threshold; the
    claim's side is on the right.
    """
    points: list[dict[str, object]] = []
    for model, answers in found.items():
        for one in answers:
            if one.found is None:
                continue
            half = (one.found.high - one.found.low) / 2 or 1e-9
            sign = 1 if one.side == "above" else -1
            at, *ends = (
                sign * (x - one.threshold) / half
                for x in (one.found.value, one.found.low, one.found.high)
            )
            low, high = sorted(max(-FAR, min(FAR, end)) for end in ends)
            points.append(
                {
                    "claim": one.claim,
                    "verdict": one.verdict,
                    "model": model,
                    "low": low,
                    "high": high,
                }
            )
            points[-1]["at"] = max(-FAR, min(FAR, at))
    scale = alt.Scale(type="symlog", domain=[-FAR, FAR])
    axis = alt.Axis(values=[-FAR, -10, -3, -1, 0, 1, 3, 10, FAR], format="+d")
    names, models = [*dict.fromkeys(str(one["claim"]) for one in points)], [*found]
    base = alt.Chart(alt.Data(values=points)).encode(
        y=alt.Y("claim:N", sort=names, title=None, axis=alt.Axis(labelLimit=220)),
        yOffset=alt.YOffset("model:N", sort=models),
        color=alt.Color(
            "verdict:N",
            scale=alt.Scale(domain=[*SHADES], range=[*SHADES.values()]),
            title=None,
        ),
    )
    bars = base.mark_rule(strokeWidth=3).encode(
        x=alt.X(
            "low:Q",
            scale=scale,
            axis=axis,
            title="from the threshold, in half intervals; right: the claim",
        ),
        x2="high:Q",
    )
    threshold = (
        alt.Chart(alt.Data(values=[{"x": 0}]))
        .mark_rule(color=INK)
        .encode(x=alt.X("x:Q", scale=scale))
    )
    shape = alt.Shape(
        "model:N", sort=models, title=None, scale=alt.Scale(range=["circle", "diamond"])
    )
    dots = base.mark_point(filled=True, size=70).encode(
        x=alt.X("at:Q", scale=scale), shape=shape
    )
    told = (
        "Lines: 95 % intervals. A claim holds, or fails, where its whole line is on one"
        " side of 0."
    )
    title = titled(f"Claims of the field on {' and '.join(models)}", told)
    return (
        alt.layer(threshold, bars, dots)
        .properties(width=460, title=title, padding=16)
        .configure(**LIGHT)
    )


def choices(rows: list[dict[str, object]], title: str) -> alt.LayerChart:
    """The KL that each set leaves on held-out text: a row a way to choose, a colour a
    text to choose by.
    """
    kl = {str(row["key"]): row["kl"] for row in rows if "kl" in row}
    points = []
    for row in rows:
        found = CHOSEN.fullmatch(str(row.get("key", "")))
        if found:
            losses = kl[f"skipped: {' '.join(row['set'])} on {', '.join(JUDGED)}"]  # type: ignore[arg-type]
            points.append({**found.groupdict(), "kl": fmean(losses)})  # type: ignore[arg-type]
    texts = [*dict.fromkeys(point["text"] for point in points)]
    scale, axis = alt.Scale(zero=False), alt.Axis(tickCount=7, format=".1f")
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X(
            "kl:Q",
            title="KL to the original model on held-out text, nats per token",
            scale=scale,
            axis=axis,
        ),
        y=alt.Y(
            "way:N", sort=[*dict.fromkeys(point["way"] for point in points)], title=None
        ),
        yOffset=alt.YOffset("text:N", sort=texts),
    )
    dots = base.mark_point(filled=True, size=70, opacity=0.8).encode(
        color=alt.Color(
            "text:N",
            sort=texts,
            title="chosen by",
            scale=alt.Scale(range=[*SPECTRUM[:3]]),
        ),
    )
    means = base.mark_tick(thickness=2, color=GREY).encode(
        x=alt.X("mean(kl):Q"), detail="text:N"
    )
    told = (
        f"{points[0]['count']} attentions skipped; a dot per choice of calibration"
        " windows, a bar per mean."
    )
    return (
        alt.layer(means, dots)
        .properties(width=460, height=320, title=titled(title, told), padding=16)
        .configure(**LIGHT)
    )


def main() -> None:
    folders, names = [Path(folder) for folder in sys.argv[1::2]], sys.argv[2::2]
    found = {
        name: [
            *map(
                Answer.model_validate_json,
                (folder / "claims.jsonl").read_text(encoding="utf-8").splitlines(),
            )
        ]
        for folder, name in zip(folders, names)
    }
    save(distances(found), folders[0] / "claims")
    chosen = lines.read_lines(folders[0] / "measured.jsonl")
    save(
        choices(chosen, f"Sets chosen by text and by way, {names[0]}"),
        folders[0] / "choices",
    )


if __name__ == "__main__":
    main()
