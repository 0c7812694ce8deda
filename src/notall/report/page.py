"""One self-contained page from a results folder: nothing in it is fetched from anywhere."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from ..charts import layers
from ..charts.layers import Saving, Sublayer
from ..charts.style import DARK, LIGHT, VEGALITE, on_page
from ..errors import UsageError, shortened
from ..experiments import bench, compare, draft, driver, evaluate, paper, pareto, repair, search, sweep
from ..experiments.folder import Folder, read_folder
from ..experiments.shown import Figure, Section, Shown, Step
from ..files import write_whole
from ..results.evaluations import AnswersRecord
from ..results.lines import finite
from ..results.record import Quartiles, Record
from ..results.repairs import HealRecord, MeasuredRecord, RefitRecord
from ..results.table import Column, Table, as_csv, csv_of, in_bytes, number, table, words

MOST = 1e300  # that is a number to look at; a whole one may have thousands of digits
SHORT = 120  # letters of a name; the tables' CSV and the provenance have all of them
MARK = b'<p class="kicker">notall report</p>'
MAP = 104  # pixels of the layer map's height
BAR = 48  # of a bar's with its words


class Verb(Protocol):
    """A module of `experiments`, as far as a page is about it; asked of folders that hold a record of its own."""

    def shown(self, folder: Folder) -> Shown: ...


# In the order of a page: of each group the first of whose kinds a record is there.
VERBS: tuple[tuple[tuple[Verb, tuple[type[Record], ...]], ...], ...] = (
    (
        (sweep, (sweep.SweepRecord,)),
        (paper, (paper.ClaimRecord, driver.BenchmarkRecord, driver.DiagnosticsRecord, paper.TimesRecord)),
        (sweep, (driver.SimilarityRecord,)),
    ),
    ((compare, (compare.ComparisonRecord,)),),
    ((search, (search.SearchRecord,)),),
    ((bench, (bench.BenchRecord,)),),
    ((repair, (RefitRecord, HealRecord)), (evaluate, (MeasuredRecord,))),
    ((pareto, (pareto.ParetoRecord,)),),
    ((draft, (draft.DraftRecord,)),),
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
        if path.exists() and (head := _beginning(path)) and MARK not in head:
            raise UsageError(f"{shortened(path)} is there, and is no page of notall: choose another -o")
        page = render(read_folder(Path(folder)))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path.resolve(), page)
    except OSError as error:
        raise UsageError(f"cannot write {shortened(path)}: {error.strerror}; choose another -o") from None
    return path


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(100_000)


def render(folder: Folder) -> str:
    """The page as HTML, under 3 MB for any model that fits a machine. Raises `UsageError` where nothing is to show."""
    return laid_out(folder, shown_by(folder))


def shown_by(folder: Folder) -> list[Shown]:
    """What the verbs that a folder holds records of have to say of it."""
    asked = (next((verb for verb, kinds in group if any(kind in folder for kind in kinds)), None) for group in VERBS)
    return [verb.shown(folder) for verb in asked if verb]


def laid_out(folder: Folder, shown: Sequence[Shown]) -> str:
    """The page of what verbs have to say of a folder."""
    from jinja2 import Environment, PackageLoader

    page = Page(folder, tuple(shown))
    told = page.told
    if not (page.parts or told.steps or told.similarity or told.message or told.cards):
        # answers are of eval, whose results are not kept, or of a paper that has only begun
        alone = "answers alone make no page: let notall eval or notall paper end"
        advice = f"make some with notall sweep --out {folder.path}, or let a run end"
        raise UsageError(f"{folder.path} holds no results; {alone if AnswersRecord in folder else advice}")
    templates = Environment(
        loader=PackageLoader("notall.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters["short"] = _short
    css, js = (files("notall.report").joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return templates.get_template("page.html").render(page=page, told=told, css=css, js=js, runtime=_runtime())


def _short(text: str, length: int = SHORT) -> str:
    return text if len(text) <= length else text[:length] + "…"


@cache
def _runtime() -> str:
    """Vega, Vega-Lite and Vega-Embed in the version that Altair writes for."""
    import vl_convert

    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGALITE)
    return str(bundle).replace("</script", r"<\/script")


# --- what the template reads ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """A figure of the page: where it is drawn, and which CSV it is copied as."""

    id: str
    figure: Figure
    copied: str


@dataclass(frozen=True)
class Part:
    """A section of the page; `name` tells it from the others, and `steps` are the page's."""

    name: str
    section: Section
    figures: tuple[Drawn, ...]
    steps: tuple[int | None, ...]
    follows: bool  # whether its figures mark the step


@dataclass(frozen=True)
class Page:
    """All that verbs say of a folder, in their order; the first that has steps is the one to step through."""

    folder: Folder
    shown: tuple[Shown, ...]

    @cached_property
    def stepped(self) -> Shown:
        return next((one for one in self.shown if one.steps), Shown())

    @cached_property
    def told(self) -> Shown:
        """The first message, the first cards and the first steps, and all else; the costs of most sublayers."""
        costs = [one.costs for one in self.shown if one.costs]
        return replace(
            self.stepped,
            message=next((one.message for one in self.shown if one.message), None),
            cards=next((one.cards for one in self.shown if one.cards), ()),
            similarity=next((one.similarity for one in self.shown if one.similarity), ()),
            costs=max(costs, key=lambda one: len(one.found), default=None),
            samples=tuple(sample for one in self.shown for sample in one.samples),
        )

    @cached_property
    def about(self) -> dict[str, Any]:
        return self.folder.provenance.flat

    @cached_property
    def layers(self) -> int:
        """How many the model has at least, as far as the folder tells."""
        skipped = (layer for step in self.told.steps for layer in (*step.plan.attention, *step.plan.mlp))
        alone = (layer for _, layer in (self.told.costs.found if self.told.costs else ()))
        found = [*skipped, *alone, *(row.layer for row in self.told.similarity)]
        return max(self.folder.layers, 1 + max(found, default=-1))

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Sections that hold something, those of foreign files last."""
        own = [(one, section) for one in self.shown for section in one.sections]
        foreign = [
            (Shown(), Section(name, name.replace("_", " "), table=as_it_is(rows)))
            for name, rows in self.folder.foreign.items()
        ]
        found: dict[str, Part] = {}
        for one, section in (*own, *foreign):
            if section.figures or (section.table and section.table.rows):
                taken = sum(part.section.name == section.name for part in found.values())
                name = f"{section.name}-{taken + 1}" if taken else section.name
                found[name] = self._part(name, one, section)
        return tuple(found.values())

    @cached_property
    def cells(self) -> list[Sublayer]:
        return layers.sublayers(self.layers, self.told.costs.found if self.told.costs else {}, self.told.similarity)

    @cached_property
    def map(self) -> Drawn | None:
        if not (self.told.steps and self.layers):
            return None
        title = _short(self.told.costs.title) if self.told.costs else "changed: 1 − cosine"
        chart = layers.layer_map(self.cells, title)
        return Drawn("map", Figure(on_page(chart, MAP), "map of the model"), "map")

    @cached_property
    def bars(self) -> list[Saving]:
        return [bar for number, step in enumerate(self.told.steps) for bar in _savings(number, step)]

    @cached_property
    def savings(self) -> Drawn | None:
        if not self.bars:
            return None
        spec = on_page(layers.savings(self.bars), BAR * len({bar.measure for bar in self.bars}))
        return Drawn("savings", Figure(spec, "time and bytes of the plan beside the dense model"), "savings")

    @property
    def weighed(self) -> bool:
        """Whether bars tell of bytes too."""
        return any(step.footprint and step.dense for step in self.told.steps)

    @property
    def provenance(self) -> list[tuple[str, str]]:
        """What to type first, and when it was typed; the machine without what stands beside it."""
        if not self.about:
            return []
        about = dict(self.about)
        if isinstance(machine := about.get("machine"), dict):
            about["machine"] = {key: value for key, value in machine.items() if about.get(key) != value}
        first = {name: about.get(name) or "not written down" for name in ("command", "date")}
        return list(flatten(first | about | first))

    @property
    def data(self) -> dict[str, Any]:
        """What the page's program reads."""
        own = [drawn for drawn in (self.map, self.savings) if drawn]
        drawn = [*own, *(one for part in self.parts for one in part.figures)]
        followers = [*own, *(one for part in self.parts if part.follows for one in part.figures)]
        csv = {"map": as_csv(self.cells), "savings": as_csv(self.bars)}
        for part in self.parts:
            csv |= {one.copied: one.figure.csv for one in part.figures if one.figure.csv}
            csv |= {part.name: part.section.table.csv} if part.section.table else {}
        return {
            "next": self.told.message.command if self.told.message else "",
            "specs": finite({one.id: one.figure.spec for one in drawn}),  # sums of what is very large
            "themes": {"light": LIGHT, "dark": DARK},
            "plans": [
                {"name": _short(step.name), "skipped": step.plan.names, "told": step.told} for step in self.told.steps
            ],
            "csv": csv,
            "followers": [
                one.id
                for one in followers
                if any(param["name"] == "plan" for param in one.figure.spec.get("params", ()))
            ],
        }

    def _part(self, name: str, one: Shown, section: Section) -> Part:
        figures = []
        for place, figure in enumerate(section.figures):
            id = f"{name}{place}" if len(section.figures) > 1 else name
            figures.append(Drawn(id, figure, f"{id}-figure" if figure.csv else name))
        steps = section.steps or (None,) * len(section.table.rows if section.table else ())
        return Part(name, section, tuple(figures), tuple(self._step(one, step) for step in steps), one is self.stepped)

    def _step(self, one: Shown, step: int | None) -> int | None:
        """The page's number of a step of one verb: of the same plan, where it is another that is stepped through."""
        if step is None or one is self.stepped:
            return step
        plans = [found.plan.unrepaired for found in self.told.steps]
        plan = one.steps[step].plan.unrepaired
        return plans.index(plan) if plan in plans else None


def _savings(number: int, step: Step) -> Iterator[Saving]:
    """Shares of the dense model's; of times as they were paired, round by round."""

    def bar(measure: str, text: str, share: float, low: float, high: float) -> Saving:
        told = f"{measure}: {text}"
        return Saving(plan=number, name=_short(step.name), measure=measure, text=told, share=share, low=low, high=high)

    def timed(measure: str, ms: Quartiles, faster: Quartiles) -> Saving:
        text = f"{ms.median:,.1f} ms, {faster.median:.2f}× as fast"
        return bar(measure, text, 1 / faster.median, 1 / faster.high, 1 / faster.low)

    if times := step.times:
        yield timed("first token", times.prefill_ms, times.speedup_prefill)
        yield timed("each further token", times.decode_ms_per_token, times.speedup_decode)
    if (left := step.footprint) and (dense := step.dense):
        for measure, ours, whole in (
            ("weights", left.weight_bytes, dense.weight_bytes),
            ("KV cache a token", left.kv_bytes_per_token, dense.kv_bytes_per_token),
            ("states", left.state_bytes, dense.state_bytes),
        ):
            if whole and ours is not None:
                share = ours / whole
                yield bar(measure, f"{in_bytes(ours)} of {in_bytes(whole)}", share, share, share)


def flatten(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """Nested records as `a.b`, value."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, str(value)


def as_it_is(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Lines that no command of ours wrote, without lists and provenance; their CSV has plain values only."""
    told = [{key: value for key, value in row.items() if not isinstance(value, list)} for row in rows]
    names = dict.fromkeys(key for row in told for key, value in row.items() if value is not None)
    names.pop("provenance", None)
    plain = [{key: value for key, value in row.items() if not isinstance(value, dict)} for row in told]
    return replace(table("", [_column(name, told) for name in names], told), csv=csv_of(plain))


def _column(name: str, rows: Sequence[Mapping[str, Any]]) -> Column[Mapping[str, Any]]:
    """Of figures, where a row has nothing else there."""
    found = [value for row in rows if (value := row.get(name)) is not None]
    if all(isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST for value in found):
        return number(name, lambda row: row.get(name), ".4g")
    return words(name, lambda row: row.get(name))
