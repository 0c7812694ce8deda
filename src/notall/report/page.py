"""One self-contained page from a results folder: nothing in it is fetched from
anywhere.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from importlib.resources import files
from pathlib import Path

from ..charts import layers
from ..charts.layers import Saving, Sublayer
from ..charts.style import DARK, LIGHT, VEGALITE, on_page
from ..errors import UsageError, shortened
from ..experiments import (
    bench,
    compare,
    draft,
    driver,
    evaluate,
    paper,
    pareto,
    repair,
    search,
    sweep,
)
from ..experiments.folder import Figure, Folder, Section, Shown, Step
from ..files import contents, refuse_others, write_whole, writing
from ..results import lines
from ..results.ledger import header_of, kind_at, read
from ..results.record import KINDS, Record
from ..results.repairs import AnswersRecord, HealRecord, MeasuredRecord, RefitRecord
from ..results.table import as_csv, in_bytes
from ..strict_json import Settings

SHORT = 120  # letters of a name; the tables' CSV and the provenance have all of them
SENTENCE = 400  # letters of a cell: a claim is whole
MARK = b'<p class="kicker">notall report</p>'
MAP, BAR = 104, 48  # pixels of the height of the layer map, and of a bar with its words


# In the order of a page: of each group the first of whose kinds a record is there.
VERBS: tuple[
    tuple[tuple[Callable[[Folder], Shown], tuple[type[Record], ...]], ...], ...
] = (
    (
        (sweep.shown, (sweep.SweepRecord,)),
        (
            paper.shown,
            (
                paper.ClaimRecord,
                driver.BenchmarkRecord,
                driver.DiagnosticsRecord,
                paper.TimesRecord,
            ),
        ),
        (sweep.shown, (driver.SimilarityRecord,)),
    ),
    ((compare.shown, (compare.ComparisonRecord,)),),
    ((search.shown, (search.SearchRecord,)),),
    ((bench.shown, (bench.BenchRecord,)),),
    ((repair.shown, (RefitRecord, HealRecord)), (evaluate.shown, (MeasuredRecord,))),
    ((pareto.shown, (pareto.ParetoRecord,)),),
    ((draft.shown, (draft.DraftRecord,)),),
)


def write_report(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    join: Sequence[str | os.PathLike[str]] = (),
) -> Path:
    """Write the page of a results folder to `out`, whole or not at all, and answer
    where it is.

    With the comparisons of the folders `join`, which are of the same model and held-out
    text. Raises `UsageError` where they are not, a folder holds no results or a
    malformed line, or `out` can't be written or is no page.
    """
    path = Path(out)
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(
            f"{shortened(path)} is no name of a page: choose one that ends in .html"
        )
    with writing(shortened(path), "choose another -o"):
        refuse_others(
            path.resolve(), lambda page: MARK in contents(page), "page of notall"
        )
        read = [read_folder(Path(one)) for one in (folder, *join)]
        page = render(compare.joined(read) if join else read[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path.resolve(), page)
    return path


def read_folder(path: Path) -> Folder:
    """Read what is there. Raises `UsageError` where nothing is, a line is malformed, or
    models are mixed.
    """
    if path.is_file():
        raise UsageError(f"{path} is a file: give the folder that it lies in")
    if not path.is_dir():
        raise UsageError(
            f"there is no folder {path}; make one with notall sweep --out {path}"
        )
    files = dict[str, tuple[Record, ...]]()
    for file in sorted(path.glob("*.jsonl")):
        if name := kind_at(file):
            kind = KINDS[name]
            header = header_of(file) if kind.headed else None
            update = {"provenance": header.provenance} if header else {}
            files[name] = tuple(
                one.model_copy(update=update) for one in read(file, kind)
            )
    if not any(files.values()):
        inside = next(
            (child for child in sorted(path.iterdir()) if any(child.glob("*.jsonl"))),
            None,
        )
        advice = (
            f"{inside} does"
            if inside
            else f"make some with notall sweep --out {path}, or let a run end"
        )
        raise UsageError(f"{path} holds no results; {advice}")
    heads = [
        (KINDS[name].file, held[0].provenance) for name, held in files.items() if held
    ]
    models = {
        str(one.what["revision"]): (file, one)
        for file, one in heads
        if one and "revision" in one.what
    }
    if len(models) > 1:
        told = (
            f"{file} is of {shortened(str(one.what.get('model')))}, {of[:9]}"
            for of, (file, one) in models.items()
        )
        raise UsageError(
            f"{path} holds results of several models ({'; '.join(told)}): move the"
            " others elsewhere"
        )
    return Folder(path, files)


def shown_by(folder: Folder) -> list[Shown]:
    """What the verbs that a folder holds records of have to say of it.

    The first one opens on what a search in the folder found, as in `plan.search`;
    without a search of that name, on the repair of a plan, as in `plan.repaired`.
    """
    asked = (
        next(
            (shown for shown, kinds in group if any(kind in folder for kind in kinds)),
            None,
        )
        for group in VERBS
    )
    found = [shown(folder) for shown in asked if shown] or [Shown()]
    for chosen in _chosen_in(folder.path):
        first, *others = found
        steps, begin = (*first.steps, *chosen.steps), len(first.steps) + chosen.first
        found = [
            replace(first, message=chosen.message, steps=steps, first=begin),
            chosen,
            *others,
        ]
    return found


def _chosen_in(path: Path) -> Iterator[Shown]:
    """What searches and repairs in a folder came to."""
    for file in sorted(path.glob(f"*.search/{search.SearchRecord.file}")):
        yield search.shown(read_folder(file.parent))
    for file in sorted(path.glob(f"*.repaired/{MeasuredRecord.file}")):
        if not file.parent.with_suffix(".search").is_dir():  # whose page tells of it
            yield repair.shown(read_folder(file.parent))


def render(folder: Folder, shown: Sequence[Shown] | None = None) -> str:
    """The page as HTML, under 3 MB, of what verbs say of a folder, or of `shown`;
    `UsageError` if that is nothing.
    """
    from jinja2 import Environment, PackageLoader

    page = Page(folder, tuple(shown_by(folder) if shown is None else shown))
    told = page.told
    if not (page.parts or told.steps or told.similarity or told.message or told.cards):
        # answers are of eval, whose results are not kept, or of a paper that has only
        # begun
        alone = "answers alone make no page: let notall eval or notall paper end"
        advice = f"make some with notall sweep --out {folder.path}, or let a run end"
        raise UsageError(
            f"{folder.path} holds no results;"
            f" {alone if AnswersRecord in folder else advice}"
        )
    loader = PackageLoader("notall.report", ".")
    templates = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters |= {"short": _short, "sentence": partial(_short, length=SENTENCE)}
    css, js = (
        files("notall.report").joinpath(name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js")
    )
    return templates.get_template("page.html").render(
        page=page, told=told, css=css, js=js, runtime=_runtime()
    )


def _short(text: str, length: int = SHORT) -> str:
    return text if len(text) <= length else text[:length] + "…"


@cache
def _runtime() -> str:
    """Vega, Vega-Lite and Vega-Embed in the version that Altair writes for."""
    import vl_convert

    bundle = vl_convert.javascript_bundle(
        "window.vegaEmbed = vegaEmbed;", vl_version=VEGALITE
    )
    return str(bundle).replace("</script", r"<\/script")


@dataclass(frozen=True)
class Page:
    """All that verbs say of a folder, in their order; the first that has steps is the
    one to step through.
    """

    folder: Folder
    shown: tuple[Shown, ...]

    @cached_property
    def stepped(self) -> Shown:
        return next((one for one in self.shown if one.steps), Shown())

    @cached_property
    def told(self) -> Shown:
        """The first message, the first cards and the first steps, and all else; the
        costs of most sublayers.
        """
        costs = [one.costs for one in self.shown if one.costs]
        return replace(
            self.stepped,
            message=next((one.message for one in self.shown if one.message), None),
            cards=next((one.cards for one in self.shown if one.cards), ()),
            similarity=next(
                (one.similarity for one in self.shown if one.similarity), ()
            ),
            costs=max(costs, key=lambda one: len(one.found), default=None),
            samples=tuple(sample for one in self.shown for sample in one.samples),
        )

    @cached_property
    def about(self) -> Settings:
        found = self.folder.provenance
        return {**found.what, **found.where}

    @cached_property
    def layers(self) -> int:
        """How many the model has at least, as far as the folder tells."""
        parts = [
            part for step in self.told.steps for part in (step.plan, step.plan.prefill)
        ]
        skipped = [layer for part in parts for layer in (*part.attention, *part.mlp)]
        alone = [
            layer for _, layer in (self.told.costs.found if self.told.costs else ())
        ]
        found = [*skipped, *alone, *(row.layer for row in self.told.similarity)]
        return max([self.folder.layers, *(layer + 1 for layer in found)])

    @cached_property
    def parts(self) -> list[Section]:
        """Sections that hold something, each with a name and the page's steps."""
        told = [(one, section) for one in self.shown for section in one.sections]
        found, taken = [], Counter[str]()
        for one, section in told:
            if section.figures or (section.table and section.table.rows):
                taken[section.name] += 1
                again = f"-{taken[section.name]}" if taken[section.name] > 1 else ""
                found.append(self._part(f"{section.name}{again}", one, section))
        return found

    @cached_property
    def cells(self) -> list[Sublayer]:
        return layers.sublayers(
            self.layers,
            self.told.costs.found if self.told.costs else {},
            self.told.similarity,
        )

    @cached_property
    def map(self) -> Figure | None:
        if not (self.told.steps and self.layers):
            return None
        title = (
            _short(self.told.costs.title) if self.told.costs else "changed: 1 − cosine"
        )
        spec = on_page(layers.layer_map(self.cells, title), MAP)
        return Figure(
            spec, "map of the model", csv=as_csv(self.cells), id="map", copied="map"
        )

    @cached_property
    def hatches(self) -> list[tuple[str, str]]:
        """Where some plan skips in the prompt alone, the map's legend: a swatch's
        class, and its words.
        """
        plans = [step.plan for step in self.told.steps]
        every = [("every", "skipped for every token")] if any(map(len, plans)) else []
        return (
            [*every, ("prompt", layers.SKIPPED_IN_PROMPT)]
            if any(one.prefill for one in plans)
            else []
        )

    @cached_property
    def savings(self) -> Figure | None:
        bars = [
            bar
            for number, step in enumerate(self.told.steps)
            for bar in _savings(number, step)
        ]
        if not bars:
            return None
        spec = on_page(layers.savings(bars), BAR * len({bar.measure for bar in bars}))
        told = "time and bytes of the plan beside the original model"
        return Figure(
            spec, told, csv=as_csv(bars), id="savings", copied="savings", follows=True
        )

    @property
    def provenance(self) -> list[tuple[str, str]]:
        """What to type first, and when it was typed; the machine without what stands
        beside it.
        """
        if not self.about:
            return []
        about = dict(self.about)
        if isinstance(machine := about.get("machine"), dict):
            about["machine"] = {
                key: value for key, value in machine.items() if about.get(key) != value
            }
        first = {
            name: about.get(name) or "not written down" for name in ("command", "date")
        }
        return list(flatten(first | about | first))

    @property
    def data(self) -> dict[str, object]:
        own = [drawn for drawn in (self.map, self.savings) if drawn]
        drawn = [*own, *(one for part in self.parts for one in part.figures)]
        csv = {one.copied: one.csv for one in drawn if one.csv}
        csv |= {part.name: part.table.csv for part in self.parts if part.table}
        steps = self.told.steps
        return {
            "next": self.told.message.command if self.told.message else "",
            "specs": lines.finite(
                {one.id: one.spec for one in drawn}
            ),  # sums of what is very large
            "themes": {"light": LIGHT, "dark": DARK},
            "plans": [
                {
                    "name": _short(step.name),
                    "skipped": step.plan.names,
                    "prompt": step.plan.prefill.names,
                    "told": step.told,
                }
                for step in steps
            ],
            "csv": csv,
            "followers": [one.id for one in drawn if one.follows],
        }

    def _part(self, name: str, one: Shown, section: Section) -> Section:
        """Steps of another verb than the one to step through are the page's of the same
        plan, if there is one.
        """
        follows, figures = one is self.stepped, []
        for place, figure in enumerate(section.figures):
            id = f"{name}{place}" if len(section.figures) > 1 else name
            copied = f"{id}-figure" if figure.csv else name
            marks = follows and any(
                param["name"] == "plan" for param in figure.spec.get("params", ())
            )
            figures.append(replace(figure, id=id, copied=copied, follows=marks))
        steps = section.steps or (None,) * len(
            section.table.rows if section.table else ()
        )
        if not follows:
            pages = {
                step.plan.unrepaired: number
                for number, step in reversed([*enumerate(self.told.steps)])
            }
            steps = tuple(
                None if step is None else pages.get(one.steps[step].plan.unrepaired)
                for step in steps
            )
        return replace(section, name=name, figures=tuple(figures), steps=steps)


def _savings(number: int, step: Step) -> Iterator[Saving]:
    """Shares of the original model's; of times as they were paired, round by round."""

    def bar(measure: str, text: str, share: float, low: float, high: float) -> Saving:
        told = f"{measure}: {text}"
        return Saving(
            plan=number,
            name=_short(step.name),
            measure=measure,
            text=told,
            share=share,
            low=low,
            high=high,
        )

    if times := step.times:
        for measure, ms, faster in (
            ("first token", times.prefill_ms, times.speedup_prefill),
            ("each further token", times.decode_ms_per_token, times.speedup_decode),
        ):
            text = f"{ms.median:,.1f} ms, {faster.median:.2f}× as fast"
            yield bar(measure, text, 1 / faster.median, 1 / faster.high, 1 / faster.low)
    if (left := step.footprint) and (dense := step.dense):
        for measure, ours, whole in (
            ("weights", left.weight_bytes, dense.weight_bytes),
            ("KV cache a token", left.kv_bytes_per_token, dense.kv_bytes_per_token),
            ("states", left.state_bytes, dense.state_bytes),
        ):
            if whole and ours is not None:
                share = ours / whole
                yield bar(
                    measure,
                    f"{in_bytes(ours)} of {in_bytes(whole)}",
                    share,
                    share,
                    share,
                )


def flatten(value: object, name: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, str(value)
