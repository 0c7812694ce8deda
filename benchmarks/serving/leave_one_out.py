"""Each attention and each MLP skipped alone: the loss on text beside the loss on
checks. Is perplexity blind?

    python benchmarks/serving/leave_one_out.py --data DATA --out results/loo   # 17 minutes on one core
    python benchmarks/serving/leave_one_out.py --data DATA --out /tmp/look --windows 2 --limit 2   # a look

All sublayers are judged on the same windows and items. GSM8K's loss is the NLL added to
its reference answers, each behind its question in the model's chat template. Called
again with the same --out, it goes on. DATA holds `wikitext2/wiki.test.raw`,
`c4/sample300.jsonl` and `gsm8k/test.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import altair as alt
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from notall import Plan, evaluate, load, locate
from notall.charts.style import INK, LIGHT as THEME, PAPER, save, titled
from notall.evaluation.harness import run_tasks
from notall.evaluation.scoring import Request, Scorer
from notall.evaluation.tasks import TaskShelf
from notall.experiments.options.model import ModelOptions
from notall.experiments.options.text import TextOptions
from notall.measuring.statistics import mean_and_error, sign_flip_p_value
from notall.models.texts import fields, read_file
from notall.plan import KIND_NAMES, Kind
from notall.results.facts import DELTA_NLL, KL, Quality, TaskScore
from notall.results.ledger import Ledger
from notall.results.lines import finite
from notall.results.provenance import Provenance, this_run
from notall.results.record import Count, Fact, LayerIndex, Number, Record, SublayerName
from notall.results.table import (
    Column,
    number,
    table,
    with_error,
    with_interval,
    within,
    words,
)
from notall.results.terminal import print_table, progress_bar
from notall.running.generating import as_asked, prompt_tokens
from notall.strict_json import Settings

TEXTS = {"WikiText-2": "wikitext2/wiki.test.raw", "C4": "c4/sample300.jsonl"}
PASSKEYS, RETRIEVAL = (
    ("passkey_256", "passkey_512"),
    (
        "retrieval_facts",
        "retrieval_copying",
    ),
)
TOGETHER = {
    "passkeys": PASSKEYS,
    "retrieval": RETRIEVAL,
    "passkeys and retrieval": PASSKEYS + RETRIEVAL,
}
TASKS = (*PASSKEYS, *RETRIEVAL, "answers")
GSM8K = "gsm8k"
NOTES = re.compile("<<.*?>>")  # the calculator's, in its answers
LENGTH = 512  # tokens of a window
SHARE, PER_ANSWER, PER_TOKEN = "share lost", "nats/answer", "nats/token"
DRAWS = 2000  # of the bootstrap
PALE = 0.2  # share lost, from which on a cell is so dark that its number is white

Scores = Mapping[
    tuple[str, str], Sequence[TaskScore]
]  # by check and unit: of the original, then of each sublayer
Floats = NDArray[np.float64]
Interval = tuple[float, float, float]


class Part(Record, kind="part", key=("judged",)):
    """What one step found, so that a run that is called again goes on."""

    judged: str
    qualities: tuple[Quality, ...] = ()
    values: tuple[tuple[Number, ...], ...] = ()


class Harm(Fact):
    """What is lost without one sublayer, on each text and on each check."""

    sublayer: SublayerName
    kind: Kind
    layer: LayerIndex
    texts: dict[str, Quality]
    scores: tuple[TaskScore, ...]

    def score(self, task: str, unit: str) -> TaskScore | None:
        of_task = (one for one in self.scores if one.task == task)
        return next(
            (one for one in of_task if bool(one.higher_is_better) == (unit == SHARE)),
            None,
        )


class Correlation(Fact):
    """The rank correlation, over sublayers, of the loss on a check with that on text;
    intervals by bootstrap.
    """

    check: str
    unit: str
    among: str
    sublayers: Count
    nll: tuple[Number, Number, Number]
    kl: tuple[Number, Number, Number]
    halves: Number  # of the loss on one half of the items with that on the other


@dataclass(frozen=True)
class Measure:
    """The loss by one measure, a value a sublayer: on all items, and on each half of
    them.
    """

    name: str
    unit: str
    lost: Floats
    halves: tuple[Floats, Floats]


def interval_column(heading: str, name: str) -> Column[Correlation]:
    return with_interval(heading, lambda one: getattr(one, name))


CORRELATIONS: tuple[Column[Correlation], ...] = (
    words("check", lambda one: one.check),
    words("loss as", lambda one: one.unit),
    words("among", lambda one: one.among),
    interval_column("Spearman with NLL added", "nll"),
    interval_column("with KL", "kl"),
    number("between halves", lambda one: one.halves, ".2f"),
)


def recovery_column(task: str) -> Column[Harm]:
    def interval(one: Harm) -> Interval | None:
        score = one.score(task, SHARE)
        return score.recovery.interval if score and score.recovery else None

    return with_interval(f"{task} recovery", interval)


def added_column(task: str, unit: str) -> Column[Harm]:
    def added(one: Harm) -> tuple[float, float] | None:
        score = one.score(task, unit)
        return (score.delta, score.delta_se) if score else None

    return with_error(f"{task} NLL added, {unit}", added)


def text_columns(name: str) -> list[Column[Harm]]:
    columns: tuple[Column[Harm], ...] = tuple(
        within((DELTA_NLL, KL), lambda one: one.texts[name])
    )
    return [Column(f"{name} {one.heading}", one.cell, one.right) for one in columns]


@dataclass(frozen=True)
class Judge:
    """What is asked of a model and its plans; the first plan is the original model,
    beside which the others stand.
    """

    asked: argparse.Namespace
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plans: Sequence[Plan]
    about: Provenance
    kept: Ledger[Part]

    def on_texts(self) -> dict[str, tuple[Quality, ...]]:
        """The quality of each plan but the first, by text."""
        found = {}
        for name, file in TEXTS.items():
            if (name,) not in self.kept:
                windows = TextOptions(
                    str(self.asked.data / file), self.asked.windows, LENGTH, 4
                )
                batches, _ = windows.windows(self.model, self.tokenizer)
                qualities = tuple(evaluate(self.model, self.plans[1:], batches))
                self.kept.add(
                    Part(judged=name, qualities=qualities, provenance=self.about)
                )
            found[name] = self.kept[name,].qualities
        return found

    def on_gsm8k(self) -> list[TaskScore]:
        """The NLL of reference answers, teacher-forced, in nats/token."""
        if (GSM8K,) not in self.kept:
            requests = self._answers()
            found = np.zeros((len(self.plans), len(requests)))
            for scores in Scorer(self.model).score(self.plans, requests):
                lengths = [
                    len(requests[place].continuation) for place in scores.requests
                ]
                found[:, scores.requests] = -scores.log_likelihoods.numpy() / lengths
            self.kept.add(
                Part(
                    judged=GSM8K,
                    values=tuple(map(tuple, found.tolist())),
                    provenance=self.about,
                )
            )
        dense, *_ = values = self.kept[GSM8K,].values
        return [nll_score(GSM8K, PER_TOKEN, one, dense) for one in values]

    def on_checks(self) -> dict[tuple[str, str], list[TaskScore]]:
        """The scores on the checks, and of those with a reference answer also its NLL,
        in nats/answer.
        """
        shelf = TaskShelf()
        jobs = [
            shelf.build(name, None, self.asked.limit) for name in shelf.names(TASKS)
        ]
        found: dict[tuple[str, str], list[TaskScore]] = {}
        nlls: dict[str, list[list[float]]] = {}
        folder = self.asked.out / "judged"
        with progress_bar() as progress:
            results = run_tasks(
                self.model,
                self.tokenizer,
                self.plans,
                jobs,
                folder=folder,
                progress=progress,
            )
        for result in results:
            task, said = (
                result.score.task,
                [sample.answers[0] for sample in result.samples],
            )
            found.setdefault((task, SHARE), []).append(result.score)
            if isinstance(
                said[0], tuple
            ):  # the log-likelihood, and whether greedy decoding says the same
                nlls.setdefault(task, []).append([-one[0] for one in said])
        for task, values in nlls.items():
            found[task, PER_ANSWER] = [
                nll_score(task, PER_ANSWER, one, values[0]) for one in values
            ]
        return found

    def _answers(self) -> list[Request]:
        """Reference answers without the calculator's notes, each behind its question as
        the model is asked it.
        """
        file = self.asked.data / "gsm8k/test.jsonl"
        content = read_file(file, "GSM8K's test questions")
        questions, answers = (
            fields(file, content, name)[: self.asked.limit]
            for name in ("question", "answer")
        )
        found = []
        for question, answer in zip(questions, answers):
            text, plain = (
                as_asked(self.tokenizer, question),
                not self.tokenizer.chat_template,
            )
            prompt = prompt_tokens(self.tokenizer, text, add_special_tokens=plain)
            said = prompt_tokens(
                self.tokenizer, NOTES.sub("", answer), add_special_tokens=False
            )
            found.append(Request((*prompt, *said[:-1]), tuple(said)))
        return found


def nll_score(
    task: str, unit: str, values: Sequence[float], dense: Sequence[float]
) -> TaskScore:
    """NLLs of the same answers by a plan and by the original model, as a score."""
    value, value_se = mean_and_error(values)
    differences = [one - base for one, base in zip(values, dense)]
    delta, delta_se = mean_and_error(differences)
    return TaskScore(
        task=task, metric=unit, num_fewshot=0, documents=len(values), value=value, value_se=value_se, delta=delta,
        delta_se=delta_se, p_value=sign_flip_p_value(differences), higher_is_better=False,
        values=tuple(round(one, 5) for one in values),
    )  # fmt: skip


def measures_of(
    texts: Mapping[str, Sequence[Quality]], scores: Scores
) -> list[Measure]:
    """Both losses on text, the loss on each check, and on checks together: passkeys,
    other retrieval, all retrieval.
    """
    found = []
    for heading, field in ((DELTA_NLL.heading, "delta_nll"), (KL.heading, "kl")):
        parts = np.array(
            [[getattr(one, field) for one in qualities] for qualities in texts.values()]
        )
        found.append(
            Measure(f"text, {heading}", PER_TOKEN, parts.mean(0), (parts[0], parts[1]))
        )
    values = {of: np.array([one.values for one in each]) for of, each in scores.items()}
    order = [
        (task, unit)
        for task in (*TASKS, GSM8K)
        for unit in (SHARE, PER_ANSWER, PER_TOKEN)
    ]
    found += [item_measure(*of, values[of]) for of in order if of in values]
    for name, tasks in TOGETHER.items():
        for unit in (SHARE, PER_ANSWER):
            found.append(
                item_measure(
                    name,
                    unit,
                    np.concatenate([values[task, unit] for task in tasks], axis=1),
                )
            )
    return found


def item_measure(name: str, unit: str, values: Floats) -> Measure:
    """From values of items, (plans, items), the original model's first."""

    def lost(part: Floats) -> Floats:
        means = part.mean(1)
        if unit != SHARE:
            return np.asarray(means[1:] - means[0])
        return (
            np.asarray(1 - means[1:] / means[0])
            if means[0] > 0
            else np.full(len(means) - 1, math.nan)
        )

    return Measure(
        name, unit, lost(values), (lost(values[:, ::2]), lost(values[:, 1::2]))
    )


def spearman(one: Floats, other: Floats) -> float:
    """The rank correlation, ties at their mean rank; nan where a side is constant, or
    not known.
    """
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return math.nan
    first, second = (ranks - ranks.mean() for ranks in map(ranked, (one, other)))
    spread = math.sqrt(first @ first * (second @ second))
    return float(first @ second / spread) if spread else math.nan


def ranked(values: Floats) -> Floats:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[places])


def correlated(one: Floats, other: Floats) -> Interval:
    """Spearman's, and its 95 % interval: percentiles of a bootstrap over sublayers."""
    draws = np.random.default_rng(0).integers(0, len(one), (DRAWS, len(one)))
    found = [
        value
        for draw in draws
        if math.isfinite(value := spearman(one[draw], other[draw]))
    ]
    low, high = (
        np.quantile(found, (0.025, 0.975)).tolist() if found else (math.nan, math.nan)
    )
    return spearman(one, other), low, high


def correlations_of(
    measures: Sequence[Measure], kinds: Sequence[Kind]
) -> list[Correlation]:
    """Of each measure with both losses on text, among all sublayers and among those of
    each kind.
    """
    groups = {"all": np.arange(len(kinds))}
    groups |= {
        KIND_NAMES[kind]: np.flatnonzero([one == kind for one in kinds])
        for kind in dict.fromkeys(kinds)
    }
    nll, kl, *_ = measures
    return [
        Correlation(
            check=one.name, unit=one.unit, among=name, sublayers=len(group),
            nll=correlated(one.lost[group], nll.lost[group]), kl=correlated(one.lost[group], kl.lost[group]),
            halves=spearman(*(half[group] for half in one.halves)),
        )
        for one in measures[1:]
        for name, group in groups.items()
    ]  # fmt: skip


def harm_map(
    measures: Sequence[Measure], harms: Sequence[Harm], title: str
) -> alt.FacetChart:
    """A column a layer and a row a measure, attentions above MLPs; shade and number:
    the share lost, per cent.
    """
    by_name = {(one.name, one.unit): one for one in measures}
    rows = {
        "text": 1 - np.exp(-by_name[f"text, {KL.heading}", PER_TOKEN].lost),
        **{
            name: by_name[name, SHARE].lost
            for name in ("passkeys", "retrieval", "answers")
        },
        "GSM8K": 1 - np.exp(-by_name[GSM8K, PER_TOKEN].lost),
    }
    cells = [
        {
            "kind": f"{KIND_NAMES[harm.kind]}s",
            "layer": harm.layer,
            "by": name,
            "lost": finite(float(share)),
        }
        | {
            "sublayer": harm.sublayer,
            "label": f"{100 * share:.0f}" if abs(share) >= 0.005 else "",
        }
        for name, shares in rows.items()
        for harm, share in zip(harms, shares)
    ]
    base = alt.Chart(alt.Data(values=cells)).encode(
        x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, ticks=False)),
        y=alt.Y(
            "by:N", title=None, sort=[*rows], axis=alt.Axis(ticks=False, domain=False)
        ),
    )
    scale = alt.Scale(type="sqrt", domain=[0, 1], clamp=True)
    legend = alt.Legend(
        orient="bottom",
        gradientLength=260,
        format=".0%",
        values=[0, 0.05, 0.25, 0.5, 1],
    )
    shades = base.mark_rect(stroke=PAPER).encode(
        color=alt.Color("lost:Q", title="share lost", scale=scale, legend=legend),
        tooltip=[
            "sublayer:N",
            "by:N",
            alt.Tooltip("lost:Q", title="share lost", format=".1%"),
        ],
    )
    ink = alt.condition(f"datum.lost > {PALE}", alt.value(PAPER), alt.value(INK))
    layers = alt.layer(
        shades, base.mark_text(fontSize=9).encode(text="label:N", color=ink)
    )
    told = (
        (
            "Share lost, per cent (below 0: a gain): of passkeys found at 256 and 512"
            " tokens, of facts and copies retrieved,"
        ),
        (
            "of first choices in the original model's own answers. Text: 1 − exp(−KL);"
            " GSM8K: 1 − exp(−NLL added)."
        ),
    )
    rows_of = alt.Row(
        "kind:N",
        title=None,
        sort=["attentions", "MLPs"],
        header=alt.Header(labelFontSize=12),
    )
    whole = layers.properties(
        width=26 * (1 + max(one.layer for one in harms)), height=24 * len(rows)
    )
    return (
        whole.facet(row=rows_of)
        .properties(title=titled(title, told), padding=16)
        .configure(**THEME)
    )


def settings(asked: argparse.Namespace, model: PreTrainedModel) -> Provenance:
    """What was asked for, and where it ran."""
    sizes = {
        "windows": asked.windows,
        "length": LENGTH,
        "limit": asked.limit,
        "texts": TEXTS,
    }
    about = ModelOptions(asked.model).provenance(model, **sizes)
    ran = this_run("python", "benchmarks/serving/leave_one_out.py")
    return about.model_copy(update={"where": {**about.where, **ran}})


def write(
    out: Path,
    about: Provenance,
    dense: Settings,
    harms: Sequence[Harm],
    correlations: Sequence[Correlation],
) -> None:
    """The records and the tables; `dense` are the original model's values on the items
    of each check.
    """
    for name, facts in (("sublayers", harms), ("correlations", correlations)):
        first = {**about.what, **about.where} | (
            {"dense": dense} if facts is harms else {}
        )
        lines = [
            json.dumps(finite(first)),
            *(one.model_dump_json(exclude_none=True) for one in facts),
        ]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    columns: list[Column[Harm]] = [
        words("skipped", lambda one: one.sublayer),
        *(column for name in harms[0].texts for column in text_columns(name)),
        *(recovery_column(task) for task in TASKS),
        *(added_column(task, PER_ANSWER) for task in PASSKEYS + RETRIEVAL),
        added_column(GSM8K, PER_TOKEN),
    ]
    tables = [
        table("Spearman's rank correlation over sublayers", CORRELATIONS, correlations),
        table("Each sublayer skipped alone", columns, harms),
    ]
    told = (
        f"{about.in_words}: {about.what['windows']} windows of {LENGTH} tokens of each"
        f" text, {about.what['limit']} items of each check. [ ]: 95 % intervals, by"
        " bootstrap over sublayers, or of recovery paired by item. Between halves:"
        " Spearman between the losses on odd and even items, or on the two texts."
    )
    parts = [told, *(f"{one.title}\n\n{one.markdown().rstrip()}" for one in tables)]
    (out / "table.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print_table(tables[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--windows", type=int, default=8, help="of 512 tokens, of each text"
    )
    parser.add_argument("--limit", type=int, default=16, help="items of each check")
    asked = parser.parse_args()
    model, tokenizer = load(asked.model)
    parts = locate(model).sublayers
    plans = [Plan(), *(Plan(**{part.kind: [part.index]}) for part in parts)]
    about = settings(asked, model)
    judge = Judge(
        asked,
        model,
        tokenizer,
        plans,
        about,
        Ledger(asked.out / "kept", Part, about, "parts.jsonl"),
    )
    texts = judge.on_texts()
    scores: Scores = {(GSM8K, PER_TOKEN): judge.on_gsm8k(), **judge.on_checks()}
    harms = [
        Harm(
            sublayer=plans[place + 1].names[0],
            kind=part.kind,
            layer=part.index,
            texts={name: qualities[place] for name, qualities in texts.items()},
            scores=tuple(each[place + 1] for each in scores.values()),
        )
        for place, part in enumerate(parts)
    ]
    measures = measures_of(texts, scores)
    dense = {
        f"{task}, {each[0].metric}": each[0].values
        for (task, _), each in scores.items()
    }
    write(
        asked.out,
        about,
        dense,
        harms,
        correlations_of(measures, [part.kind for part in parts]),
    )
    name = Path(str(about.what["model"])).stem
    title = f"{name} with one sublayer skipped: the loss on text and on checks"
    save(harm_map(measures, harms, title), asked.out / "sublayers")


if __name__ == "__main__":
    main()
