"""One self-contained page from a results folder: nothing in it is fetched from anywhere."""

from __future__ import annotations

import os
from functools import cache
from importlib.resources import files
from pathlib import Path

from ..errors import UsageError, shortened
from ..records.columns import Row, as_csv, legend
from ..records.lines import finite
from .figures import FRONT, draw_all, map_rows, savings_rows, spaces
from .findings import findings_of, first_plan, told
from .folder import Folder, flatten, read_folder
from .message import message_of
from .plots import DARK, LIGHT, VEGALITE
from .rows import name_of, shorten, sublayers
from .tables import (
    BY_PLAN,
    TITLES,
    by_plan_table,
    claims_table,
    foreign_table,
    other_table,
    repairs_table,
    stepped_table,
)


def write_report(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write the page of a results folder to `out`, and answer where it is.

    Raises `UsageError` when the folder holds no results, a line of them is malformed, or `out` can't be written or is
    no page. A page that is there already is replaced by a whole one, or stays.
    """
    path = Path(out)
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{shortened(path)} is no name of a page: choose one that ends in .html")
    try:
        if path.exists() and not _is_page(path):
            raise UsageError(f"{shortened(path)} is there, and is no page of notall: choose another -o")
        page = render(read_folder(Path(folder)))
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path.resolve(), page)
    except OSError as error:
        raise UsageError(f"cannot write {shortened(path)}: {error.strerror}; choose another -o") from None
    return path


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(100_000)
    return not head or b'<p class="kicker">notall report</p>' in head


def _replace(path: Path, text: str) -> None:
    """Write beside the file, and take its place when all is written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def render(folder: Folder) -> str:
    """The page as HTML, under 3 MB for any model that fits a machine."""
    from jinja2 import Environment, PackageLoader

    templates = Environment(
        loader=PackageLoader("notall.reporting", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters |= {"short": shorten, "legend": legend}
    specs = finite(draw_all(folder))  # sums of what is very large: a browser's JSON knows no infinity
    tables = {"results": stepped_table(folder.kind, folder.records)} if folder.kind else {}
    if folder.claims:
        tables["claims"] = claims_table(folder.claims)
    if repairs := repairs_table(folder.records):
        tables["repairs"] = repairs
    names = {name_of(record): plan for plan, record in enumerate(folder.plans)}
    others = {name: other_table(name, rows, names) for name, rows in folder.others.items()}
    others |= {
        f"{name}-by-plan": by_plan_table(name, folder.others[name], names) for name in BY_PLAN if name in folder.others
    }
    others = {name: others[name] for name in sorted(others, key=[*TITLES, *others].index)}
    others |= {name: foreign_table(name, rows) for name, rows in folder.foreign.items()}
    return templates.get_template("page.html").render(
        model=str(folder.provenance.get("model", "a model")),
        about=folder.provenance,
        message=message_of(folder),
        provenance=list(flatten(_in_order(_without_doubles(folder.provenance)))),
        specs=specs,
        csv=_csv(folder) | {name: table.csv for name, table in (tables | others).items()},
        themes={"light": LIGHT, "dark": DARK},
        plans=[_plan(record) for record in folder.plans],
        kind=folder.kind,
        first=first_plan(folder),
        findings=findings_of(folder),
        shade=map_rows(folder)[1] if "map" in specs else "nothing",
        costs=folder.costs,
        fronts=_fronts(folder),
        layers=folder.layers,
        results=tables.get("results"),
        claims=tables.get("claims"),
        repairs=tables.get("repairs"),
        others=others,
        titles=TITLES,
        samples=_samples(folder),
        css=_asset("page.css"),
        js=_asset("page.js"),
        runtime=_runtime(),
    )


def _asset(name: str) -> str:
    return files("notall.reporting").joinpath(name).read_text(encoding="utf-8")


@cache
def _runtime() -> str:
    """Vega, Vega-Lite and Vega-Embed in the version that Altair writes for."""
    import vl_convert

    names = "window.vegaEmbed = vegaEmbed;"
    bundle = vl_convert.javascript_bundle(names, vl_version=VEGALITE)
    return str(bundle).replace("</script", r"<\/script")


def _without_doubles(about: Row) -> Row:
    """The machine's description repeats some of what stands beside it."""
    machine = about.get("machine")
    if not isinstance(machine, dict):
        return about
    return about | {"machine": {key: value for key, value in machine.items() if about.get(key) != value}}


def _in_order(about: Row) -> Row:
    """What to type first, and when it was typed; of folders that were written before this was kept, that it was not."""
    if not about:
        return {}
    return {name: about.get(name) or "not written down" for name in ("command", "date")} | about


def _plan(record: Row) -> Row:
    return {"name": shorten(name_of(record)), "skipped": sublayers(record), "told": told(record)}


def _samples(folder: Folder) -> list[Row]:
    """For each prompt what each plan says."""
    prompts: dict[str, list[dict[str, str]]] = {}
    for record in folder.samples:
        for sample in record["samples"]:
            shown = prompts.setdefault(sample["prompt"], [])
            shown.append({"name": name_of(record), "text": sample["said"].strip()})
    return [{"prompt": prompt, "said": shown} for prompt, shown in prompts.items()]


def _csv(folder: Folder) -> dict[str, str]:
    """What each figure draws."""
    named = [{"name": name_of(record), **record} for record in folder.records]
    fronts = {
        f"{FRONT}{number}": as_csv([row for row in named if row["space"] == space])
        for number, space in enumerate(_fronts(folder))
    }
    return fronts | {
        "map": as_csv(map_rows(folder)[0]),
        "savings": as_csv(savings_rows(folder.records)),
        "similarity": as_csv(folder.similarity),
        "tradeoff": as_csv(named),
    }


def _fronts(folder: Folder) -> list[str]:
    """What a panel each of the front is about."""
    return spaces(folder.records) if folder.kind == "compare" else []
