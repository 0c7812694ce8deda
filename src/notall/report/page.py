"""One self-contained page from a results folder: nothing in it is fetched from
anywhere.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from importlib.resources import files
from pathlib import Path

from ..charts import layers
from ..charts.layers import LayerCell
from ..charts.style import DARK, LIGHT, VEGALITE, on_page
from ..errors import UsageError, shortened
from ..files import contents, refuse_others, write_whole, writing
from ..results import lines
from ..results.repairs import AnswersRecord
from ..results.table import as_csv
from ..strict_json import Settings
from .comparison import join_comparisons
from .folder import Folder, read_folder
from .parts import Figure, PageParts, Section
from .savings import flatten, savings_of, short
from .verbs import parts_of

CELL_LETTERS = 400  # letters of a cell: a claim is whole
MARK = b'<p class="kicker">notall report</p>'
MAP_HEIGHT = 104  # pixels of the layer map
BAR_HEIGHT = 48  # pixels of a bar with its words


def write_report(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    join: Sequence[str | os.PathLike[str]] = (),
) -> Path:
    """Write the page of a results folder to `out`, whole or not at all; returns
    its path.

    With the comparisons of the folders `join`, which are of the same model and held-out
    text. Raises `UsageError` where they are not, a folder holds no results or a
    malformed line, or `out` can't be written or is no page.
    """
    path = Path(out)
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(
            f"{shortened(path)} is no name of a page: choose one that ends in .html"
        )
    # a link stays, and the page is written where it leads
    with writing(shortened(path), "choose another -o"):
        refuse_others(
            path.resolve(), lambda page: MARK in contents(page), "page of notall"
        )
        folders = [read_folder(Path(one)) for one in (folder, *join)]
        page = render(join_comparisons(folders) if join else folders[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path.resolve(), page)
    return path


def render(folder: Folder, parts: Sequence[PageParts] | None = None) -> str:
    """The page as HTML, under 3 MB, of what the folder's commands recorded, or of
    `parts`. Raises `UsageError` if there is nothing to show.
    """
    from jinja2 import Environment, PackageLoader

    page = Page(folder, tuple(parts_of(folder) if parts is None else parts))
    if page.is_empty:
        raise UsageError(f"{folder.path} holds no results; {_advice(folder)}")
    loader = PackageLoader("notall.report", ".")
    templates = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters["short"] = short
    templates.filters["sentence"] = partial(short, length=CELL_LETTERS)
    resources = files("notall.report")
    return templates.get_template("page.html").render(
        page=page,
        whole=page.whole,
        css=resources.joinpath("page.css").read_text(encoding="utf-8"),
        js=resources.joinpath("page.js").read_text(encoding="utf-8"),
        runtime=_runtime(),
    )


def _advice(folder: Folder) -> str:
    """What to do about a folder without results: answers to tasks alone are of eval,
    whose results are not kept, or of a paper that has only begun.
    """
    if AnswersRecord in folder:
        return "answers alone make no page: let notall eval or notall paper end"
    return f"make some with notall sweep --out {folder.path}, or let a run end"


@cache
def _runtime() -> str:
    """Vega, Vega-Lite and Vega-Embed in the version that Altair writes for."""
    import vl_convert

    bundle = vl_convert.javascript_bundle(
        "window.vegaEmbed = vegaEmbed;", vl_version=VEGALITE
    )
    # a string of the bundle would end the page's element
    return str(bundle).replace("</script", r"<\/script")


@dataclass(frozen=True)
class Page:
    """The parts of all commands, in their order; the first that has steps is the one to
    step through.
    """

    folder: Folder
    commands: tuple[PageParts, ...]

    @cached_property
    def stepped(self) -> PageParts:
        """The parts that have the steps of the page."""
        return next((one for one in self.commands if one.steps), PageParts())

    @cached_property
    def whole(self) -> PageParts:
        """The first message, the first cards and the first steps, and all else; the
        costs of most sublayers.
        """
        commands = self.commands
        messages = (one.message for one in commands if one.message)
        cards = (one.cards for one in commands if one.cards)
        similarities = (one.similarity for one in commands if one.similarity)
        costs = [one.costs for one in commands if one.costs]
        return replace(
            self.stepped,
            message=next(messages, None),
            cards=next(cards, ()),
            similarity=next(similarities, ()),
            costs=max(costs, key=lambda one: len(one.found), default=None),
            samples=tuple(sample for one in commands for sample in one.samples),
        )

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        whole = self.whole
        shown = whole.steps or whole.similarity or whole.message or whole.cards
        return not (self.sections or shown)

    @cached_property
    def about(self) -> Settings:
        """What the figures are of, and where they were measured."""
        found = self.folder.provenance
        return {**found.what, **found.where}

    @cached_property
    def layers(self) -> int:
        """How many the model has at least, as far as the folder tells."""
        plans = [step.plan for step in self.whole.steps]
        parts = [part for plan in plans for part in (plan, plan.prefill)]
        found = [layer for part in parts for layer in (*part.attention, *part.mlp)]
        if costs := self.whole.costs:
            found += [layer for _, layer in costs.found]
        found += [row.layer for row in self.whole.similarity]
        return max([self.folder.layers, *(layer + 1 for layer in found)])

    @cached_property
    def sections(self) -> list[Section]:
        """Sections that hold something, each with a name and the page's steps."""
        found, taken = [], Counter[str]()
        for parts in self.commands:
            for section in parts.sections:
                if section.figures or (section.table and section.table.rows):
                    taken[section.name] += 1
                    count = taken[section.name]
                    suffix = f"-{count}" if count > 1 else ""
                    found.append(
                        self._placed(f"{section.name}{suffix}", parts, section)
                    )
        return found

    @cached_property
    def cells(self) -> list[LayerCell]:
        """Of the layer map, one for each sublayer."""
        costs = self.whole.costs.found if self.whole.costs else {}
        return layers.sublayers(self.layers, costs, self.whole.similarity)

    @cached_property
    def map(self) -> Figure | None:
        """The layer map, which shows what each step skips; None without steps."""
        if not (self.whole.steps and self.layers):
            return None
        costs = self.whole.costs
        title = short(costs.title) if costs else "changed: 1 − cosine"
        spec = on_page(layers.layer_map(self.cells, title), MAP_HEIGHT)
        return Figure(
            spec, "map of the model", csv=as_csv(self.cells), id="map", copied="map"
        )

    @cached_property
    def hatches(self) -> list[tuple[str, str]]:
        """Where some plan skips in the prompt alone, the map's legend: a swatch's
        class, and its words.
        """
        plans = [step.plan for step in self.whole.steps]
        if not any(one.prefill for one in plans):
            return []
        in_prompt = ("prompt", layers.SKIPPED_IN_PROMPT)
        if any(len(one) for one in plans):
            return [("every", "skipped for every token"), in_prompt]
        return [in_prompt]

    @cached_property
    def savings(self) -> Figure | None:
        """Bars of time and bytes of the step's plan; None where neither is known."""
        steps = enumerate(self.whole.steps)
        bars = [bar for number, step in steps for bar in savings_of(number, step)]
        if not bars:
            return None
        height = BAR_HEIGHT * len({bar.measure for bar in bars})
        return Figure(
            on_page(layers.savings(bars), height),
            "time and bytes of the plan beside the original model",
            csv=as_csv(bars),
            id="savings",
            copied="savings",
            follows=True,
        )

    @property
    def provenance(self) -> list[tuple[str, str]]:
        """What to type first, and when it was typed; the machine without what stands
        outside of it, too.
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
        # the first two sets the order, the last the values
        return list(flatten(first | about | first))

    @property
    def data(self) -> dict[str, object]:
        """What the page's script reads: figures, plans, and the CSV of each table."""
        own = [figure for figure in (self.map, self.savings) if figure]
        figures = [*own, *(one for part in self.sections for one in part.figures)]
        csv = {one.copied: one.csv for one in figures if one.csv}
        csv |= {part.name: part.table.csv for part in self.sections if part.table}
        plans = [
            {
                "name": short(step.name),
                "skipped": step.plan.names,
                "prompt": step.plan.prefill.names,
                "told": step.description,
            }
            for step in self.whole.steps
        ]
        specs = {one.id: one.spec for one in figures}
        message = self.whole.message
        return {
            "next": message.command if message else "",
            # sums of what is very large overflow, and JSON has no infinity
            "specs": lines.finite(specs),
            "themes": {"light": LIGHT, "dark": DARK},
            "plans": plans,
            "csv": csv,
            "followers": [one.id for one in figures if one.follows],
        }

    def _placed(self, name: str, parts: PageParts, section: Section) -> Section:
        """The section with names that are unique on the page, and with the page's
        steps: of another command than the one to step through, those of the same plan.
        """
        follows, figures = parts is self.stepped, []
        for place, figure in enumerate(section.figures):
            id = f"{name}{place}" if len(section.figures) > 1 else name
            copied = f"{id}-figure" if figure.csv else name
            params = [param["name"] for param in figure.spec.get("params", ())]
            marks = follows and "plan" in params
            figures.append(replace(figure, id=id, copied=copied, follows=marks))
        rows = section.table.rows if section.table else ()
        steps = section.steps or (None,) * len(rows)
        if not follows:
            steps = tuple(self._step_of(parts, step) for step in steps)
        return replace(section, name=name, figures=tuple(figures), steps=steps)

    def _step_of(self, parts: PageParts, step: int | None) -> int | None:
        """The page's first step with the plan of a step of `parts`."""
        if step is None:
            return None
        plan = parts.steps[step].plan.unrepaired
        places = enumerate(self.whole.steps)
        return next((n for n, one in places if one.plan.unrepaired == plan), None)
