"""The tables of the paper's evaluation: Markdown, LaTeX and CSV."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from ..experiments.benchmarks import BenchmarkRecord, DiagnosticsRecord
from ..experiments.paper.claims import (
    LEAST_LAYERS,
    POINTS_MARGIN,
    SPEEDUP_MARGIN,
    of_quantity,
)
from ..experiments.paper.records import DENSE_ROW, Average, ClaimRecord, TimesRecord
from ..experiments.paper.run import PaperResults
from ..experiments.paper.scoreboard import Scoreboard, heading_of, is_share
from ..files import write_whole
from ..measuring.statistics import LEAST_DOCUMENTS, LEAST_ROUNDS, LEAST_WINDOWS
from ..models.names import model_in_words
from ..plan import several
from ..results.facts import CONFIGURED, SIGNIFICANT, Configured
from ..results.ledger import working_in
from ..results.provenance import Provenance, place_of
from ..results.record import Fact, Record, is_number
from ..results.table import (
    EMPTY,
    Cell,
    Column,
    Table,
    as_csv,
    as_latex,
    formatted,
    pivot,
    table,
    words,
)

CLAIM_RULE = (
    "A claim holds where the whole 95 % interval of its figure is on the claim's side"
    " of a threshold, does not hold where it is on the other side, and else is"
    " inconclusive. The threshold is 0, or lies a margin away from it, or from what"
    f" the paper reports: {POINTS_MARGIN:g} point of an average, {SPEEDUP_MARGIN:g} of a"
    " speedup. Intervals are Student's t, and not corrected for the number of claims."
    f" Too few: fewer than {LEAST_DOCUMENTS} documents of a task, {LEAST_ROUNDS} timed"
    f" rounds, {LEAST_WINDOWS} windows of text, or {LEAST_LAYERS} layers."
)


CLAIMS: tuple[Column[ClaimRecord], ...] = (
    words("claim", lambda one: one.claim),
    words("verdict", lambda one: one.verdict),
    words("here", lambda one: one.here),
)


Entry = tuple[Configured, str, Cell]  # a row, the heading of a column, the cell there


def benchmark_figures(board: Scoreboard) -> Iterator[Entry]:
    """Values in per cent, and their average; what is no share is as it is."""
    for row in board.cells.values():
        for column, score in row.items():
            yield score, column, _score_cell(score)
    for average in board.averages():
        yield average, "average", _percent_cell(average)


def _score_cell(score: BenchmarkRecord) -> Cell:
    if is_share(score):
        return _percent_cell(score)
    if is_number(score.value):
        return Cell(score.value, f"{score.value:.3g}")
    return EMPTY


def _percent_cell(score: Average | BenchmarkRecord) -> Cell:
    return _compared_cell(score, ".1f", score.p_value < SIGNIFICANT, 100)


def diagnostics_figures(records: Iterable[DiagnosticsRecord]) -> Iterator[Entry]:
    """Each check, marked where it got worse beyond its error; none of a model that
    overflows.
    """
    for one in records:
        if is_number(one.value) and is_number(one.delta):
            dense = one.value - one.delta
            yield DENSE_ROW, one.check, Cell(dense, f"{dense:.3g}")
            yield one, one.check, _compared_cell(one, ".3g", one.worse)


def time_figures(
    records: Iterable[TimesRecord], quantity: Literal["prefill", "decode"]
) -> Iterator[Entry]:
    """Milliseconds by prompt length: median, and how many times dense's speed, of the
    rounds' own ratios.
    """
    for one in records:
        taken, speedup = of_quantity(one.times, quantity)
        ratio = f"{speedup.median:.2f}× [{speedup.low:.2f}, {speedup.high:.2f}]"
        note = "" if one.variant == "dense" else f"({ratio})"
        cell = Cell(taken.median, f"{taken.median:.1f}", note)
        yield one, f"prompt {one.prompt_tokens}, batch {one.concurrency}", cell


def _compared_cell(
    one: Average | BenchmarkRecord | DiagnosticsRecord,
    form: str,
    marked: bool,
    scale: int = 1,
) -> Cell:
    """A value, with its difference to dense ± its standard error; of dense itself with
    its own.
    """
    if not is_number(one.value):
        return EMPTY
    text = formatted(scale * one.value, form)
    if one.variant != "dense":
        delta = formatted(scale * one.delta, f"+{form}") + "*" * marked
        error = formatted(scale * one.delta_se, form)
        return Cell(one.value, text, f"({delta} ± {error})")
    if not is_number(one.value_se):
        return Cell(one.value, text, "")
    return Cell(one.value, text, f"± {formatted(scale * one.value_se, form)}")


def half(entries: Iterable[Entry], keep_last: bool, title: str = "") -> Table:
    """A row for each configuration of half of the grid; dense is of both halves."""
    own = [
        (row, column, cell)
        for row, column, cell in entries
        if row.variant == "dense" or row.keep_last == keep_last
    ]
    return pivot(title, CONFIGURED[:2], own, lambda row: row.configuration)[0]


ENDINGS = {False: "last-skipped", True: "last-kept"}
RATIOS = (
    "in brackets how many times the original model's speed [quartiles]. These ratios"
    " are taken within a round, so that they may differ from those of the medians."
)


# Of each kind of table: its title, and what its cells say.
CAPTIONS = {
    "benchmarks": (
        "Benchmarks",
        (
            "Per cent ± standard error; in brackets the difference to the original,"
            " paired by document, ± its standard error. * p < 0.05 (McNemar's exact"
            " test for accuracies; flipped signs of documents' differences for others"
            " and the average), not corrected for the number of comparisons. The"
            " average is over the tasks that every row has."
        ),
    ),
    "diagnostics": (
        "What accuracy hides",
        (
            "NLL in nats at so many tokens into a text, the share of passkeys found in"
            " texts of so many tokens, the expected calibration error of the next"
            " token, and greedy continuations beside the original's. In brackets the"
            " difference to the original model ± its standard error; * worse, p < 0.05,"
            " not corrected for the number of comparisons."
        ),
    ),
    "prefill": (
        "Prefill time (ms)",
        f"Median of {{rounds}}, each of all rows in turn; {RATIOS}",
    ),
    "decode": (
        "Decode time per new token (ms)",
        (
            "{generation_tokens}. Median of {rounds}, each of all rows in turn,"
            f" with a real KV cache; {RATIOS}"
        ),
    ),
}


CAPTION_COUNTS = {"rounds": "round", "generation_tokens": "new token"}


def write_tables(found: PaperResults, out: Path) -> None:
    """Write `paper.md`, and each table as .tex and .csv, into the folder `out`."""
    about, board = found.provenance, Scoreboard(found.benchmarks)
    model = model_in_words(str(about.what.get("model")))
    measured = entries_of(board, found.benchmarks, found.times, found.checks)
    halves = {
        f"{kind}-{ending}": half(
            figures, keep_last, caption_of(kind, records, keep_last)
        )
        for kind, records, figures in measured
        for keep_last, ending in ENDINGS.items()
    }
    evidence = (
        "The claims of arXiv 2407.15516, as it makes them of Llama-2 7B and 13B, and"
        f" our evidence on {model}."
    )
    tables = dict(halves)
    if found.claims:
        claims = table(f"{evidence} {CLAIM_RULE}", CLAIMS, found.claims)
        tables = {"claims": claims} | tables
    texts = {
        f"{name}.tex": as_latex(one, caption=one.title, label=name)
        for name, one in tables.items()
    }
    records: dict[str, Sequence[Fact]] = {
        "claims": found.claims,
        "benchmarks": found.benchmarks,
        "averages": board.averages(),
        "times": found.times,
        "diagnostics": found.checks,
    }
    texts |= {f"{name}.csv": as_csv(some) for name, some in records.items() if some}
    texts["paper.md"] = _as_markdown(
        found, model, [kind for kind, *_ in measured], halves
    )
    with working_in(out, "paper"):
        for name, text in texts.items():
            write_whole(out / name, text)


def _as_markdown(
    found: PaperResults, model: str, kinds: Sequence[str], halves: Mapping[str, Table]
) -> str:
    """The claims, the similarity, and of each of `kinds` the two halves of the grid."""
    about = found.provenance
    place = place_of(about.where.get("machine"))
    claims = table("claims", CLAIMS, found.claims).markdown()
    parts = [
        f"# The evaluation of arXiv 2407.15516 on {model}",
        f"{about.what['dtype']} on {place}. Weights: {about.what['revision']}.",
        f"## The paper's claims, and this model\n\n{claims}\n{CLAIM_RULE}",
        "## Similarity\n\n![Similarity by depth](similarity.png)",
    ]
    for kind in kinds:
        parts.append(f"## {CAPTIONS[kind][0]}")
        for ending in ENDINGS.values():
            one = halves[f"{kind}-{ending}"]
            parts.append(f"{one.title}\n\n{one.markdown()}".rstrip("\n"))
    return "\n\n".join(parts) + "\n"


def entries_of(
    board: Scoreboard,
    benchmarks: Sequence[BenchmarkRecord],
    times: Sequence[TimesRecord],
    checks: Sequence[DiagnosticsRecord],
) -> list[tuple[str, Sequence[Record], list[Entry]]]:
    """Of each kind of table that there are records for: its name, the records, and its
    cells.
    """
    every: list[tuple[str, Sequence[Record], Iterator[Entry]]] = [
        ("benchmarks", benchmarks, benchmark_figures(board)),
        ("diagnostics", checks, diagnostics_figures(checks)),
        ("prefill", times, time_figures(times, "prefill")),
        ("decode", times, time_figures(times, "decode")),
    ]
    return [(name, records, [*entries]) for name, records, entries in every if records]


def caption_of(
    kind: str, records: Sequence[Record], keep_last: bool | None = None
) -> str:
    """How to read the cells of a table, and how it was made; of half of the grid it
    begins with which half that is.
    """
    title, note = CAPTIONS[kind]
    what = records[0].what
    counts = {
        name: _several(what.get(name), noun) for name, noun in CAPTION_COUNTS.items()
    }
    reading = f"{note.format_map(counts)} {_made(records)}"
    if keep_last is None:
        return reading
    last = "kept" if keep_last else "skipped too"
    return (
        f"{title} of {model_in_words(str(what.get('model')))} with the deepest of its"
        f" attentions, MLPs or blocks skipped, the last layer {last}. {reading}"
    )


def _several(count: object, noun: str) -> str:
    """Of a count that a record may lack, or have damaged."""
    return several(count, noun) if isinstance(count, int) else f"? {noun}s"


def _made(records: Sequence[Record]) -> str:
    """The dtype and the machine; of benchmarks the tasks, too."""
    about = records[0].provenance or Provenance(what={})
    place = place_of(about.where.get("machine"), versions=False)
    where = f"{about.what.get('dtype')} on {place}."
    asked = {
        (one.task, one.metric): one
        for one in records
        if isinstance(one, BenchmarkRecord)
    }
    if not asked:
        return where
    tasks = "; ".join(
        f"{heading_of(one.task)}, {one.num_fewshot}-shot, {one.usual_metric} of"
        f" {several(one.documents, 'document')}"
        for one in asked.values()
    )
    return f"lm-evaluation-harness {about.what.get('lm_eval')}: {tasks}. {where}"
