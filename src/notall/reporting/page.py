"""One self-contained page from a results folder: nothing in it is fetched from anywhere."""

from __future__ import annotations

import os
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..plots import DARK, LIGHT, front
from .figures import draw_all, map_rows, savings_rows
from .folder import Folder, Row, flatten, name_of, read_folder, sublayers
from .tables import other_table, paired_table, to_csv

SHORT_NAME = 120  # letters of a name in a heading; the provenance has all of them


def write_report(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write the page of a results folder to `out`, and answer where it is.

    Raises `UsageError` when the folder holds no results, a line of them is malformed, or `out` can't be written.
    """
    page = render(read_folder(Path(folder)))
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; choose another -o") from None
    return path


def render(folder: Folder) -> str:
    """The page as HTML, under 3 MB for any model that fits a machine."""
    from jinja2 import Environment, PackageLoader

    templates = Environment(
        loader=PackageLoader("notall.reporting", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters["short"] = shorten
    specs = draw_all(folder)
    tables = {"results": paired_table(folder.records)} if folder.records else {}
    names = {name_of(record): plan for plan, record in enumerate(folder.plans)}
    others = {name: other_table(name, rows, names) for name, rows in folder.others.items()}
    return templates.get_template("page.html").render(
        model=str(folder.provenance.get("model", "a model")),
        about=folder.provenance,
        provenance=list(flatten(_without_doubles(folder.provenance))),
        specs=specs,
        csv=_csv(folder) | {name: table.csv for name, table in (tables | others).items()},
        themes={"light": LIGHT, "dark": DARK},
        plans=[_plan(record) for record in folder.plans],
        first=_first(folder),
        findings=_findings(folder),
        shade=map_rows(folder)[1] if "map" in specs else "nothing",
        layers=folder.layers,
        results=tables.get("results"),
        others=others,
        samples=_samples(folder),
        css=_asset("page.css"),
        js=_asset("page.js"),
        runtime=_runtime(),
    )


def shorten(text: str, length: int = SHORT_NAME) -> str:
    return text if len(text) <= length else text[:length] + "…"


def _asset(name: str) -> str:
    return files("notall.reporting").joinpath(name).read_text(encoding="utf-8")


@cache
def _runtime() -> str:
    """Vega, Vega-Lite and Vega-Embed in the version that Altair writes for."""
    import altair as alt
    import vl_convert

    names = "window.vegaEmbed = vegaEmbed;"
    bundle = vl_convert.javascript_bundle(names, vl_version=alt.VEGALITE_VERSION.rpartition(".")[0])
    return str(bundle).replace("</script", r"<\/script")


def _without_doubles(about: Row) -> Row:
    """The machine's description repeats some of what stands beside it."""
    machine = about.get("machine")
    if not isinstance(machine, dict):
        return about
    return about | {"machine": {key: value for key, value in machine.items() if about.get(key) != value}}


def _plan(record: Row) -> dict[str, Any]:
    return {"name": name_of(record), "skipped": sublayers(record), "told": _told(record)}


def _told(record: Row) -> str:
    """One sentence of a configuration's figures."""
    if "delta_nll" not in record:
        return f"{len(sublayers(record))} sublayers skipped."
    if record["variant"] == "dense":
        return f"nothing is skipped; {record['decode_ms_per_token']:.0f} ms a token."
    count = len(sublayers(record))
    counted = f"{count} sublayer{'s' if count > 1 else ''} skipped"
    lost = "an unknown loss" if record["delta_nll"] is None else f"{record['delta_nll']:+.2f} nats a token"
    error = "" if record["delta_nll_se"] is None else f" (± {record['delta_nll_se']:.2f})"
    return (
        f"{counted}, {lost}{error}; decodes {record['speedup_decode']:.2f} times as fast "
        f"[{record['speedup_decode_low']:.2f} to {record['speedup_decode_high']:.2f}]."
    )


def _findings(folder: Folder) -> list[dict[str, str]]:
    """The figures to see first: of the dense model, of what loses least, of what is fastest, of the front."""
    dense = folder.dense
    skipping = [record for record in folder.records if sublayers(record) and record["delta_nll"] is not None]
    if not dense or not skipping:
        return []
    least = folder.records[_first(folder)]
    fastest = max(skipping, key=lambda record: record["speedup_decode"])
    best = front([(1.0, 0.0), *((record["speedup_decode"], record["delta_nll"]) for record in skipping)])
    on_front = [record for record in skipping if (record["speedup_decode"], record["delta_nll"]) in best]
    return [
        {
            "title": "Dense model",
            "figure": f"{dense['perplexity']:,.1f}",
            "unit": "perplexity",
            "text": f"{dense['decode_ms_per_token']:.0f} ms a token, {dense['params'] / 1e6:,.0f} million parameters",
        },
        {
            "title": "Loses least",
            "figure": f"{least['delta_nll']:+.2f}",
            "unit": "nats a token",
            "text": f"{name_of(least)}; decodes {least['speedup_decode']:.2f}×",
        },
        {
            "title": "Fastest",
            "figure": f"{fastest['speedup_decode']:.2f}×",
            "unit": "decode speedup",
            "text": f"{name_of(fastest)}; {fastest['delta_nll']:+.2f} nats a token",
        },
        {
            "title": "On the front",
            "figure": f"{len(on_front)} of {len(skipping)}",
            "unit": "plans",
            "text": "no other plan is both faster and better: "
            + ", ".join(map(_brief, on_front[:5]))
            + (" …" if len(on_front) > 5 else ""),
        },
    ]


def _first(folder: Folder) -> int:
    """The plan to begin with: what loses least."""
    lost = [
        (row["delta_nll"], plan)
        for plan, row in enumerate(folder.records)
        if sublayers(row) and row["delta_nll"] is not None
    ]
    return min(lost, default=(0, 0))[1]


def _brief(record: Row) -> str:
    return name_of(record).replace(", last layer kept", " kept")


def _samples(folder: Folder) -> list[dict[str, Any]]:
    """For each prompt what each plan says."""
    prompts: dict[str, list[dict[str, str]]] = {}
    for record in folder.samples:
        for sample in record["samples"]:
            shown = prompts.setdefault(sample["prompt"], [])
            shown.append({"name": name_of(record), "text": sample["said"].strip()})
    return [{"prompt": prompt, "said": shown} for prompt, shown in prompts.items()]


def _csv(folder: Folder) -> dict[str, str]:
    """What each figure draws."""
    found = {"map": to_csv(map_rows(folder)[0]), "similarity": to_csv(folder.similarity)}
    if folder.dense:
        found["savings"] = to_csv(savings_rows(folder.records, folder.dense))
    found["tradeoff"] = to_csv([{"name": name_of(record), **record} for record in folder.records])
    return found
