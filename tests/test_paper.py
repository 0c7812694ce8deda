"""The paper's tables and claims from records whose right answers are known, and the
whole command on a tiny model.
"""

import csv
import html
import importlib.util
import math
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip(
        "lm_eval is absent: pip install 'notall[eval]'", allow_module_level=True
    )

from lm_eval.models.huggingface import HFLM

import forked
from api import (
    LEAST_DOCUMENTS,
    LEAST_ROUNDS,
    LEAST_WINDOWS,
    BenchmarkRecord,
    Check,
    ClaimRecord,
    DiagnosticsRecord,
    Folder,
    Footprint,
    Limits,
    Provenance,
    Quartiles,
    Scoreboard,
    Scorer,
    SimilarityRecord,
    TaskChoice,
    TaskScore,
    TaskShelf,
    TimesRecord,
    TimingGrid,
    as_latex,
    benchmark_figures,
    caption_of,
    claims_of,
    cli,
    diagnose,
    diagnostics,
    diagnostics_figures,
    driver_Subject as Subject,
    escaped,
    facts_Times as Times,
    half,
    paper_grid,
    paper_tables,
    place_of,
    read,
    records_lines as lines,
    render,
    run_paper,
    shown_paper,
    silent,
    speed,
    table,
    time_figures,
    time_grid,
    words,
)
from notall import Plan, UsageError, locate
from small_disk import fills_up
from tiny_tasks import byte_tokenizer, saved, tiny_llama, write_tasks

pytestmark = pytest.mark.any_transformers  # of records and claims

ABOUT = {"model": "tiny"}


def configured(key):
    return {"variant": key[0], "fraction": key[1], "keep_last": key[2], "plan": Plan()}


def benchmark(task, key, values, dense):
    mean, base = sum(values) / len(values), sum(dense) / len(dense)
    score = {
        "task": task,
        "metric": "acc,none",
        "num_fewshot": 0,
        "documents": len(values),
        "higher_is_better": True,
    }
    found = {
        "value": mean,
        "value_se": 0.05,
        "delta": mean - base,
        "delta_se": 0.01,
        "p_value": 0.01,
    }
    return BenchmarkRecord(**configured(key), **score, **found, values=tuple(values))


def cell(table, label, heading):
    """Of the row that skips so much of this."""
    place = table.headings.index(heading)
    return next(
        str(row[place]) for row in table.rows if (row[0].text, row[1].text) == label
    )


KEYS = [("dense", 0.0, False)] + [
    (variant, fraction, keep)
    for variant in ("attention", "mlp", "block")
    for fraction in (0.10, 0.33)
    for keep in (False, True)
]


def board(shares):
    """Each configuration gets a share of 200 documents right, of two tasks; the first
    ones of the list.
    """
    records = []
    for task in ("local_arc_challenge", "mmlu"):
        dense = [1.0] * 100 + [0.0] * 100
        for key in KEYS:
            right = round(200 * shares.get(key, 0.5))
            records.append(
                benchmark(task, key, [1.0] * right + [0.0] * (200 - right), dense)
            )
    return Scoreboard(records)


def timed(key, prefill, decode, prompt=128, at_once=1, rounds=5):
    def around(value, by=0.02):
        return Quartiles(median=value, low=value - by, high=value + by, n=5)

    times = Times(
        prefill_ms=around(100 / prefill),
        decode_ms_per_token=around(10 / decode),
        speedup_prefill=around(prefill),
        speedup_decode=around(decode),
    )
    return TimesRecord(
        **configured(key),
        prompt_tokens=prompt,
        concurrency=at_once,
        asked_concurrency=at_once,
        times=times,
        footprint=Footprint(params=1, weight_bytes=1, kv_bytes_per_token=1),
        provenance=Provenance(what={"rounds": rounds}),
    )


def verdicts(claims):
    return {claim.claim: claim.verdict for claim in claims}


# --- tables
# --------------------------------------------------------------------------------------


def test_averages_and_differences_by_hand():
    scores = board({("mlp", 0.33, False): 0.3})
    assert scores.shared == ["ARC-C", "MMLU"]
    difference, error, p_value = scores.difference(
        ("mlp", 0.33, False), ("dense", 0.0, False)
    )
    # 40 of 200 differ by -1: variance 0.2 x 0.8 x 200/199, over 200 documents; two
    # independent tasks.
    assert difference == pytest.approx(-0.2)
    assert error == pytest.approx(math.sqrt(2 * 0.2 * 0.8 / 199) / 2)
    assert p_value == pytest.approx(
        math.erfc(math.sqrt(80) / math.sqrt(2))
    )  # 80 documents, all worse
    rows = {
        (one.variant, one.fraction, one.keep_last): one for one in scores.averages()
    }
    assert rows.keys() == set(KEYS)
    assert rows["mlp", 0.33, False].delta == pytest.approx(-0.2)
    assert rows["mlp", 0.33, False].value == pytest.approx(0.3)
    assert rows["dense", 0.0, False].p_value == 1


def test_an_average_of_few_documents_has_no_star_that_an_exact_test_does_not_give():
    """Three documents of twenty are worse: by chance that happens one time in four,
    however small the error.
    """
    worse = [0.0, 0.0, 0.0] + [1.0] * 17
    records = [
        benchmark(task, key, [1.0] * 20, [1.0] * 20)
        for task in ("mmlu", "tiny")
        for key in KEYS[:1]
    ]
    records += [
        benchmark("mmlu", KEYS[1], worse, [1.0] * 20),
        benchmark("tiny", KEYS[1], [1.0] * 20, [1.0] * 20),
    ]
    board = Scoreboard(records)
    difference, _, p_value = board.difference(KEYS[1], KEYS[0])
    assert (difference, p_value) == (pytest.approx(-3 / 40), 2 / 8)
    assert "*" not in str(
        half(benchmark_figures(board), keep_last=KEYS[1][2]).rows[-1][-1]
    )
    fewer = [
        benchmark("tiny", KEYS[0], [0.0] * 10, [0.0] * 10),
        benchmark("tiny", KEYS[1], [1.0] + [0.0] * 9, [0.0] * 10),
    ]
    records = [*(record for record in records if record.task == "mmlu"), *fewer]
    flipped = [
        sum(signs)
        for signs in product(
            *((-term, term) for term in (1 / 20, 1 / 20, 1 / 20, 1 / 10))
        )
    ]
    found = Scoreboard(records).difference(KEYS[1], KEYS[0])[2]
    assert found == sum(abs(total) > 0.05 - 1e-9 for total in flipped) / 16


def test_the_table_says_value_difference_error_and_significance():
    table = half(benchmark_figures(board({("mlp", 0.33, False): 0.3})), keep_last=False)
    assert table.headings[2:] == ("ARC-C", "MMLU", "average")
    assert cell(table, ("dense", "0%"), "ARC-C") == "50.0 ± 5.0"
    assert cell(table, ("MLP", "33%"), "MMLU") == "30.0 (-20.0* ± 1.0)"
    assert cell(table, ("MLP", "33%"), "average").startswith("30.0 (-20.0* ± 2.0)")
    assert len(table.rows) == 1 + 6


@pytest.mark.parametrize(
    ("p_value", "mark"),
    [(0.0, "*"), (0.049, "*"), (0.05, ""), (1.0, ""), (math.nan, "")],
)
def test_a_star_is_a_small_probability_also_one_that_underflows(p_value, mark):
    records = [
        cell
        for row in board({("mlp", 0.33, False): 0.3}).cells.values()
        for cell in row.values()
    ]
    scores = Scoreboard(
        [record.model_copy(update={"p_value": p_value}) for record in records]
    )
    found = cell(
        half(benchmark_figures(scores), keep_last=False), ("MLP", "33%"), "MMLU"
    )
    assert found == f"30.0 (-20.0{mark} ± 1.0)"


def test_an_average_leaves_out_what_some_rows_lack_and_what_is_no_share():
    scores = board({})
    records = [cell for row in scores.cells.values() for cell in row.values()]
    lacking = benchmark("gsm8k", KEYS[0], [0.0, 1.0], [0.0, 1.0])
    words = [benchmark("wikitext", key, [700.0, 900.0], [700.0, 900.0]) for key in KEYS]
    rounded = [
        benchmark("truthfulqa_mc2", key, [0.2, 1.0000001], [0.2, 1.0]) for key in KEYS
    ]
    more = Scoreboard([*records, lacking, *words, *rounded])
    assert more.shared == ["ARC-C", "MMLU", "TruthfulQA"]
    table = half(benchmark_figures(more), keep_last=True)
    assert cell(table, ("block", "33%"), "GSM8K") == "-"
    assert cell(table, ("block", "33%"), "wikitext") == "800"


def test_the_time_table_reads_as_the_paper_s():
    records = [
        timed(KEYS[0], 1, 1),
        timed(("block", 0.33, True), 1.5, 1.25),
        timed(("mlp", 0.33, False), 2, 2),
    ]
    table = half(time_figures(records, "decode"), keep_last=True)
    assert (
        cell(table, ("block", "33%"), "prompt 128, batch 1")
        == "8.0 (1.25× [1.23, 1.27])"
    )
    assert len(table.rows) == 2


@pytest.mark.parametrize("keep_last", [False, True])
def test_a_table_in_latex_can_be_pasted_with_a_caption_that_reads(keep_last):
    scores = board({("mlp", 0.33, keep_last): 0.3})
    about = Provenance(what={"model": "smollm2_135", "lm_eval": "1.9e5"})
    records = [
        one.model_copy(update={"provenance": about})
        for row in scores.cells.values()
        for one in row.values()
    ]
    caption = caption_of("benchmarks", records, keep_last)
    text = as_latex(
        half(benchmark_figures(scores), keep_last),
        caption=caption,
        label="benchmarks-x",
    )
    assert "dense & 0\\% & 50.0 $\\pm$ 5.0 &" in text
    assert "MLP & 33\\% & 30.0 ($-$20.0$^{*}$ $\\pm$ 1.0) &" in text
    assert text.count("\\toprule") == 1
    assert (
        "skipped & fraction & ARC-C & MMLU & average \\\\" in text
    )  # the hyphen of a name is none of a number
    told = {False: "the last layer skipped too", True: "the last layer kept"}[keep_last]
    assert (
        "\\caption{Benchmarks of smollm2\\_135 with the deepest of its attentions, MLPs"
        " or blocks skipped, " in text
    )
    assert f"{told}. Per cent $\\pm$ standard error;" in text
    assert (
        "lm-evaluation-harness $1.9\\times10^{5}$: ARC-C, 0-shot, accuracy of 200"
        " documents; " in text
    )
    assert "\\begin{tabular}{llrrr}" in text
    assert "$^{*}$ p $<$ 0.05" in text


def of_words(rows, headings):
    columns = [
        words(heading, lambda row, place=place: row[place])
        for place, heading in enumerate(headings)
    ]
    return table("", columns, rows)


def test_rows_that_begin_alike_stand_together_and_what_is_wide_spans_the_page():
    def made(rows, columns):
        return as_latex(of_words(rows, ["a"] * columns), caption="c", label="l")

    grouped = made([["x", "1"], ["x", "2"], ["y", "3"]], 2)
    assert "x & 2 \\\\\n\\addlinespace\ny & 3" in grouped
    assert grouped.count("addlinespace") == 1
    assert "addlinespace" not in made([["x", "1"], ["y", "2"]], 2)
    assert "\\begin{table}" in grouped
    assert "resizebox" not in grouped
    wide = made([["x"] * 7], 7)
    assert "\\begin{table*}" in wide
    assert wide.count("resizebox") == 1
    assert "\\end{tabular}}\n\\end{table*}" in wide


def test_sentences_are_broken_into_lines_of_their_column():
    text = as_latex(
        of_words([["x" * 41, "y" * 40]], ["a", "b"]), caption="c", label="l"
    )
    assert "\\begin{tabular}{p{0.4\\linewidth}l}" in text


def test_latex_escapes_what_it_would_read_as_its_own():
    assert (
        escaped("50% of a_b & {c} #1 ~ ^ \\d $5")
        == "50\\% of a\\_b \\& \\{c\\} \\#1 \\textasciitilde{} \\textasciicircum{}"
        " \\textbackslash{}d \\$5"
    )


@pytest.mark.parametrize(
    ("metric", "usual"),
    [
        ("acc,none", "accuracy"),
        ("acc_norm,none", "normalized accuracy"),
        ("exact_match,strict-match", "exact match (strict match)"),
        ("my_own,none", "my own"),
        ("acc", "accuracy"),
    ],
)
def test_metrics_have_their_usual_names(metric, usual):
    score = TaskScore(
        task="t",
        metric=metric,
        num_fewshot=0,
        documents=1,
        value=0.5,
        delta=0.0,
        delta_se=0.1,
    )
    assert score.usual_metric == usual


def test_a_task_of_two_metrics_has_a_column_each():
    both = [
        benchmark("tiny", KEYS[0], [1.0], [1.0]).model_copy(update={"metric": m})
        for m in ("acc,none", "f1,none")
    ]
    assert [*Scoreboard(both).cells[KEYS[0]]] == ["tiny, accuracy", "tiny, F1"]


def test_the_diagnostics_table_marks_what_got_worse():
    def check(name, value, delta, key, p_value):
        found = {
            "value": value,
            "delta": delta,
            "delta_se": 0.02,
            "p_value": p_value,
            "higher_is_better": False,
        }
        return DiagnosticsRecord(**configured(key), part="p", check=name, **found)

    records = [
        check("NLL at 0 to 63", 3.5, 0.5, ("mlp", 0.33, False), 0.01),
        check("repetition", 0.25, -0.05, ("mlp", 0.33, False), 0.01),  # for the better
        check("NLL at 0 to 63", 9.0, 6.0, ("mlp", 0.33, True), 0.01),
        check("repetition", math.nan, math.nan, ("block", 0.33, False), 0.5),
    ]
    table = half(diagnostics_figures(records), keep_last=False)
    assert [str(one) for one in table.rows[0][2:]] == ["3", "0.3"]
    assert [str(one) for one in table.rows[1][2:]] == [
        "3.5 (+0.5* ± 0.02)",
        "0.25 (-0.05 ± 0.02)",
    ]
    assert len(table.rows) == 2


# --- claims
# --------------------------------------------------------------------------------------


def test_claims_that_hold_and_do_not():
    good = {("attention", 0.33, False): 0.5, ("mlp", 0.33, False): 0.2, ("mlp", 0.10, False): 0.45,
            ("attention", 0.33, True): 0.6, ("mlp", 0.33, True): 0.1}  # fmt: skip
    little = (
        "skipping the deepest 33% of the attentions loses no more than 1.8 points of"
        " the average (13B), within 1 point"
    )
    found = verdicts(claims_of([], board(good), []))
    assert (
        found["skipping 33% of the attentions costs less than as many MLPs"] == "holds"
    )
    assert (
        found["skipping 10% of the attentions costs less than as many MLPs"] == "holds"
    )
    assert found[little] == "holds"
    assert (
        found["keeping the last layer lowers quality when 33% of the MLPs are skipped"]
        == "holds"
    )
    assert (
        found[
            "keeping the last layer lowers quality when 33% of the blocks are skipped"
        ]
        == "inconclusive"
    )
    kept = (
        "keeping the last layer does not lower quality when 33% of the attentions are"
        " skipped, within 1 point"
    )
    assert found[kept] == "holds"
    bad = {
        ("attention", 0.33, False): 0.2,
        ("attention", 0.33, True): 0.1,
        ("mlp", 0.33, True): 0.6,
    }
    found = verdicts(claims_of([], board(bad), []))
    assert (
        found["skipping 33% of the attentions costs less than as many MLPs"]
        == "does not hold"
    )
    assert found[little] == "does not hold"
    assert (
        found["keeping the last layer lowers quality when 33% of the MLPs are skipped"]
        == "does not hold"
    )
    assert found[kept] == "does not hold"


def test_claims_about_similarity():
    def rows(cosines):
        about = Provenance(what={"sequences": windows})
        return [
            SimilarityRecord(
                layer=i, kind="block", cosine=c, cosine_se=0.001, provenance=about
            )
            for i, c in enumerate(cosines)
        ]

    windows = LEAST_WINDOWS
    rising = [0.5 + 0.01 * i for i in range(20)]
    assert list(
        verdicts(claims_of(rows([*rising, 0.4]), Scoreboard([]), [])).values()
    ) == ["holds", "holds"]
    assert (
        list(
            verdicts(claims_of(rows([*rising[::-1], 0.9]), Scoreboard([]), [])).values()
        )
        == ["does not hold"] * 2
    )
    flat = [0.5 + 0.01 * (i % 2) for i in range(20)]
    assert (
        list(verdicts(claims_of(rows([*flat, flat[-1]]), Scoreboard([]), [])).values())
        == ["inconclusive"] * 2
    )
    windows -= 1
    found = claims_of(rows([*rising, 0.4]), Scoreboard([]), [])
    assert {claim.verdict for claim in found} == {"too few"}
    assert all(claim.here.endswith(f", on {windows} windows") for claim in found)
    windows += 1
    few = claims_of(rows([0.5, 0.6, 0.7, 0.8, 0.9, 0.4]), Scoreboard([]), [])[0]
    assert (few.verdict, few.here.endswith(", too few to tell a trend")) == (
        "too few",
        True,
    )


def test_a_claim_says_what_is_subtracted_from_what_and_has_its_figures_as_numbers():
    found = {
        claim.claim: claim
        for claim in claims_of([], board({("mlp", 0.33, True): 0.4}), [])
    }
    kept = found[
        "keeping the last layer lowers quality when 33% of the MLPs are skipped"
    ]
    told = (
        "last layer skipped less last layer kept: +10.0 ± 1.5 points of the average of"
        " 2 tasks"
    )
    assert kept.here == f"{told}, 95 % interval +7.0 to +13.0"
    assert (kept.figure, kept.unit, kept.threshold) == (pytest.approx(10), "points", 0)
    skipping = [
        timed((variant, 0.33, False), 1.3, 1.3)
        for variant in ("attention", "mlp", "block")
    ]
    fast, *_ = claims_of([], Scoreboard([]), [timed(KEYS[0], 1, 1), *skipping])
    reach = (
        4.302653 * 0.93 * 0.04 / math.sqrt(5)
    )  # Student's t of two degrees of freedom
    assert (fast.figure, fast.low, fast.high) == pytest.approx(
        (1.3, 1.3 - reach, 1.3 + reach)
    )
    assert (fast.threshold, fast.unit) == (pytest.approx(1.15), "times as fast")
    assert "last layer skipped too" in fast.claim


def test_claims_about_time_are_judged_at_the_longest_prompt_and_the_smallest_batch():
    def grid(attention, mlp, block, *size):
        cells = {
            ("attention", 0.33, False): attention,
            ("mlp", 0.33, False): mlp,
            ("block", 0.33, False): block,
        }
        return [
            timed(KEYS[0], 1, 1, *size),
            *(timed(key, value, value, *size) for key, value in cells.items()),
        ]

    others = [*grid(1.0, 2.0, 1.0, 128), *grid(1.0, 2.0, 1.0, 512, 8)]
    found = claims_of([], Scoreboard([]), [*others, *grid(1.3, 1.1, 1.12, 512)])
    assert [claim.verdict for claim in found] == ["holds", "holds", "inconclusive"] * 2
    found = claims_of([], Scoreboard([]), grid(1.0, 2.0, 1.0, 128))
    assert {claim.verdict for claim in found} == {"does not hold"}


def few(documents):
    """Both tasks, each of so many documents, that every configuration answers alike."""
    answers = [1.0, 0.0] * (documents // 2) + [1.0] * (documents % 2)
    return Scoreboard(
        [
            benchmark(task, key, answers, answers)
            for task in ("mmlu", "tiny")
            for key in KEYS
        ]
    )


@pytest.mark.parametrize("documents", [6, LEAST_DOCUMENTS - 1, LEAST_DOCUMENTS])
def test_no_claim_is_judged_on_a_few_documents(documents):
    found = claims_of([], few(documents), [])
    is_few = {claim.verdict == "too few" for claim in found}
    assert is_few == {documents < LEAST_DOCUMENTS}
    assert {
        f"with as few as {documents} documents of a task" in claim.here
        for claim in found
    } == is_few


@pytest.mark.parametrize("rounds", [1, LEAST_ROUNDS - 1, LEAST_ROUNDS])
def test_no_claim_is_judged_in_a_few_rounds(rounds):
    cells = {
        ("attention", 0.33, False): 1.3,
        ("mlp", 0.33, False): 1.1,
        ("block", 0.33, False): 1.4,
    }
    grid = [
        timed(KEYS[0], 1, 1, rounds=rounds),
        *(timed(key, s, s, rounds=rounds) for key, s in cells.items()),
    ]
    found = claims_of([], Scoreboard([]), grid)
    assert {claim.verdict for claim in found} == {
        "too few" if rounds < LEAST_ROUNDS else "holds"
    }
    assert all(
        (f"in {rounds} round{'s' * (rounds > 1)}" in claim.here)
        == (rounds < LEAST_ROUNDS)
        for claim in found
    )
    unknown = [record.model_copy(update={"provenance": None}) for record in grid]
    assert {claim.verdict for claim in claims_of([], Scoreboard([]), unknown)} == {
        "too few"
    }


def measured(drop, error, other=0.0):
    """A board of one task, whose errors are told and whose documents are not: dense,
    and attentions without a third.
    """
    dense = benchmark("mmlu", KEYS[0], [0.5] * 4000, [0.5] * 4000)
    rows = [
        dense.model_copy(update={**configured(key), "values": None}) for key in KEYS
    ]
    lost = {"value": 0.5 - drop, "delta": -drop, "delta_se": error, "values": None}
    rows[KEYS.index(("attention", 0.33, False))] = dense.model_copy(
        update=configured(("attention", 0.33, False)) | lost
    )
    return Scoreboard(rows)


@pytest.mark.parametrize(
    ("drop", "error", "verdict"),
    [
        (0.018, 0.004, "holds"),  # what the paper reports, of benchmarks whole
        (0.0, 0.004, "holds"),
        (0.018, 0.02, "inconclusive"),  # and of a few documents
        (0.040, 0.004, "does not hold"),
    ],
)
def test_a_loss_as_large_as_the_papers_is_what_it_says(drop, error, verdict):
    little, *_ = claims_of([], measured(drop, error), [])
    assert (little.threshold, little.verdict) == (pytest.approx(-2.8), verdict)


def test_not_lowering_quality_holds_where_it_is_the_same_within_a_point():
    """Quality need not rise."""
    same = [1.0, 0.0] * 2000
    kept = ("attention", 0.33, True)

    def found(values):
        records = [
            benchmark("mmlu", key, values if key == kept else same, same)
            for key in KEYS
        ]
        (claim,) = (
            one
            for one in claims_of([], Scoreboard(records), [])
            if "does not lower" in one.claim
        )
        return claim.verdict

    assert found(same) == "holds"
    assert found([0.0] * 40 + same[40:]) == "holds"  # half a point lower
    assert found([0.0] * 400 + same[400:]) == "does not hold"
    assert found([0.0] * 80 + same[80:]) == "inconclusive"  # just the margin


def test_a_speed_as_the_papers_is_about_as_fast():
    def found(speed, spread):
        keys = [
            ("attention", 0.33, False),
            ("mlp", 0.33, False),
            ("block", 0.33, False),
        ]
        quartiles = Quartiles(
            median=speed, low=speed - spread, high=speed + spread, n=5
        )
        records = [timed(key, 1, 1) for key in (KEYS[0], *keys)]
        times = records[1].times.model_copy(
            update={"speedup_decode": quartiles, "speedup_prefill": quartiles}
        )
        records[1] = records[1].model_copy(update={"times": times})
        return claims_of([], Scoreboard([]), records)[0].verdict

    assert found(1.18, 0.005) == "holds"
    assert found(1.18, 0.05) == "inconclusive"
    assert found(1.1, 0.005) == "does not hold"


def test_margins_are_told_with_the_claims_and_in_the_documentation():
    told = paper_tables.CLAIM_RULE
    assert "1 point of an average, 0.03 of a speedup" in told
    for claim in claims_of([], board({}), [timed(key, 1, 1) for key in KEYS]):
        assert ("within" in claim.claim) == (claim.threshold not in (0.0,))
    pages = Path(__file__).parents[1] / "docs"
    for page in ("paper.md", "claims.md"):
        text = " ".join((pages / page).read_text(encoding="utf-8").split())
        assert "1 point of an average, 0.03 of a speedup" in text, page


def test_a_speed_of_one_round_is_no_headline(tmp_path):
    def said(rounds):
        quartiles = Quartiles(median=1.3, low=1.29, high=1.31, n=rounds)
        record = timed(("attention", 0.33, False), 1.3, 1.3)
        times = record.times.model_copy(update={"speedup_decode": quartiles})
        records = (timed(KEYS[0], 1, 1), record.model_copy(update={"times": times}))
        folder = Folder(tmp_path, {TimesRecord.kind_name: records})
        return shown_paper(folder).message.sentence

    assert "1.30× as fast (95 % interval 1." in said(5)
    assert "it was timed in 1 round, too few to say how fast it is" in said(1)
    assert "1.30" not in said(1)


def test_one_of_anything_is_one():
    about = Provenance(what={"rounds": 1, "generation_tokens": 2})
    times = [timed(KEYS[0], 1, 1).model_copy(update={"provenance": about})]
    assert "Median of 1 round, each" in caption_of("prefill", times)
    assert "accuracy of 1 document." in caption_of(
        "benchmarks", [benchmark("tiny", KEYS[0], [1.0], [1.0])]
    )


def test_a_page_has_every_claim_whole(tmp_path):
    claims = claims_of([], few(6), [timed(key, 1, 1, rounds=1) for key in KEYS])
    about = Provenance(what={"model": "tiny"}, where={"command": "notall paper tiny"})
    claims = tuple(claim.model_copy(update={"provenance": about}) for claim in claims)
    page = render(Folder(tmp_path, {ClaimRecord.kind_name: claims}))
    for claim in claims:
        assert f"<bdi>{html.escape(claim.claim)}</bdi>" in page
        assert f"<bdi>{html.escape(claim.here)}</bdi>" in page


# --- times
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def grid_of(
    model, out, rows=None, *, prompt_tokens=(4,), generation_tokens=2, concurrency=(1,)
):
    subject = Subject(model, None, [], out, Provenance(what=ABOUT))
    timing = TimingGrid(prompt_tokens, generation_tokens, concurrency, rounds=1)
    return time_grid(subject, rows or paper_grid(locate(model)), timing)


def test_times_of_the_grid_are_kept_and_taken_up(model, tmp_path, monkeypatch):
    first = grid_of(model, tmp_path)
    assert len(first) == 19
    assert first[0].times.speedup_decode.median == 1
    assert {
        record.prompt_tokens
        for record in grid_of(model, tmp_path, prompt_tokens=(4, 8))
    } == {4, 8}
    held = (tmp_path / TimesRecord.file).read_bytes()
    monkeypatch.setattr(speed, "compare_speeds", None)
    assert grid_of(model, tmp_path) == first
    assert (tmp_path / TimesRecord.file).read_bytes() == held


@pytest.mark.parametrize(
    "change",
    [
        {"plan": {"attention": [0], "mlp": []}},
        {"fraction": 0.5},
        {"variant": "block", "fraction": 0.2},
        {"concurrency": 3},
        {"prompt_tokens": 5},
    ],
)
def test_times_of_another_row_or_batch_are_measured_again(model, tmp_path, change):
    first = grid_of(model, tmp_path)
    path = tmp_path / TimesRecord.file
    held = lines.read_lines(path)
    path.unlink()
    lines.append(path, *held[:5], held[5] | change, *held[6:])
    again = grid_of(model, tmp_path)
    assert [(record.key, record.plan) for record in again] == [
        (record.key, record.plan) for record in first
    ]
    assert {record.concurrency for record in again} == {1}


@pytest.mark.parametrize(
    "machine", [None, "here", {}, {"versions": []}, {"versions": {"torch": "2"}}]
)
def test_a_machine_that_is_not_told_is_none(machine):
    assert place_of(machine) == "a machine that is not told"


def test_a_batch_that_does_not_fit_is_halved(model, tmp_path, monkeypatch):
    compare, tried = speed.compare_speeds, []

    def short_of_memory(model, variants, workload, **options):
        tried.append(workload.concurrency)
        if workload.concurrency > 2:
            raise RuntimeError("CUDA out of memory.")
        return compare(model, variants, workload, **options)

    monkeypatch.setattr(speed, "compare_speeds", short_of_memory)
    rows = paper_grid(locate(model))[:2]
    dense, _ = grid_of(model, tmp_path, rows, concurrency=(8,))
    assert tried == [8, 4, 2]
    assert (dense.concurrency, dense.asked_concurrency) == (2, 8)
    monkeypatch.setattr(
        speed,
        "compare_speeds",
        lambda *_, **__: (_ for _ in ()).throw(RuntimeError("CUDA out of memory.")),
    )
    with pytest.raises(UsageError, match="one sequence"):
        grid_of(model, tmp_path / "b", rows)


# --- the diagnostics
# --------------------------------------------------------------------------------------


def test_each_check_is_of_its_own_row(model, tmp_path, monkeypatch):
    def attentions(model, tokenizer, plans, windows, *, parts, seed):
        about = {"value_se": 0.0, "delta": 0.0, "delta_se": 0.0, "p_value": 1.0}
        return [
            [Check(check="attentions", value=float(sum(plan.attention)), **about)]
            for plan in plans
        ]

    monkeypatch.setattr(diagnostics, "run_diagnostics", attentions)
    rows, windows = paper_grid(locate(model))[1:], [torch.zeros(1, 8)]
    records = diagnose(
        Subject(model, object(), [], tmp_path, Provenance(what=ABOUT)),
        rows,
        windows,
        silent,
    )
    assert len(records) == 3 * len(rows)
    assert len({record.value for record in records}) > 2
    for record in records:
        assert record.value == sum(record.plan.attention)


class Machine:
    """A clock that only work moves: a token that is read takes 1, of one sequence 2,
    one that is generated 20.
    """

    def __init__(self):
        self.time, self.told = 0.0, []

    def tell(self, done, total, doing):
        self.told.append((done / total, self.time))


@pytest.mark.usefixtures("own_tasks_only")
def test_the_bar_tells_the_share_of_the_time_that_has_passed(
    model, tmp_path, monkeypatch
):
    """What generates does so plan by plan, and on seven of them; all plans read the
    rest in the time of four.
    """
    machine, score, answer = Machine(), Scorer.score, HFLM.generate_until

    def scoring(self, plans, requests):
        for scores in score(self, plans, requests):
            machine.time += (
                sum(len(requests[number].sequence) for number in scores.requests)
                * len(plans)
                / 5
            )
            yield scores

    def generating(self, requests, **how):
        for request in requests:
            machine.time += len(request.args[0]) / 4 + 20 * int(
                request.args[1]["max_gen_toks"]
            )
        return answer(self, requests, **how)

    def timing(model, plans, workload, *, seed, progress):
        for number in range(len(plans) + 1):
            progress(number, len(plans) + 1, "timing")
            machine.time += (
                2
                * (workload.rounds + 1)
                * (workload.prompt_tokens + 20 * workload.generation_tokens)
            )
        return {name: timed(KEYS[0], 1, 1).times for name in ("dense", *plans)}

    monkeypatch.setattr(Scorer, "score", scoring)
    monkeypatch.setattr(HFLM, "generate_until", generating)
    monkeypatch.setattr(speed, "time_plans", timing)
    choice = TaskChoice(
        TaskShelf(write_tasks(tmp_path / "tasks")),
        ("tiny_letters", "tiny_words"),
        limits=Limits(40),
    )
    about = Provenance(what={"model": "tiny", "dtype": "float32", "revision": "none"})
    subject = Subject(
        model, byte_tokenizer(), [torch.arange(32).view(2, 16)], tmp_path / "out", about
    )
    run_paper(subject, choice, TimingGrid((8, 64), 4, rounds=2), progress=machine.tell)
    assert machine.told[-1][0] == pytest.approx(1)
    off = [abs(share - time / machine.time) for share, time in machine.told if time]
    assert len(off) > 50
    assert max(off) < 0.08, max(off)


# --- the command
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("paper")
    return saved(tiny_llama(), path / "tiny"), write_tasks(path / "tasks")


@pytest.mark.parametrize("command", ["paper", "sweep"])
def test_a_fraction_of_more_than_all_is_refused(folders, tmp_path, run, command):
    out = tmp_path / "out"
    code, _, err = run(command, folders[0], "--fraction", "33", "--out", out)
    assert code == 2
    assert "fraction 33 skips nothing, or more than there is" in err
    assert not out.exists()


@pytest.mark.usefixtures("own_tasks_only")
def test_a_refused_run_leaves_no_folder(folders, tmp_path, run):
    model, task_path = folders
    out = tmp_path / "new" / "paper"
    words = [
        "paper",
        model,
        "--task-path",
        task_path,
        "--tasks",
        "tiny_text",
        "--sequences",
        "2",
        "--length",
        "16",
    ]
    sizes = [
        "--prompt-tokens",
        "4",
        "--generation-tokens",
        "2",
        "--num-fewshot",
        "30",
    ]  # more than there are
    code, _, err = run(*words, *sizes, "--out", out)
    assert code == 2
    assert "cannot build the requests of tiny_text" in err
    assert not (tmp_path / "new").exists()
    out.mkdir(parents=True)
    assert run(*words, *sizes, "--out", out)[0] == 2
    assert out.is_dir()  # one that was there stays


@pytest.fixture
def told_claims(answered, own_tasks_only):
    return lambda *arguments: answered(*arguments)["claims"]


@pytest.mark.slow
def test_the_whole_evaluation_of_a_tiny_model(folders, tmp_path, told_claims):
    model, task_path = folders
    words = [
        "paper",
        model,
        "--out",
        tmp_path,
        "--tasks",
        "tiny_letters,tiny_words",
        "--task-path",
        task_path,
        "--json",
    ]
    sizes = [
        "--limit",
        "6",
        "--limit",
        "tiny_words=2",
        "--sequences",
        "2",
        "--length",
        "16",
        "--diagnostics",
    ]
    times = [
        "--prompt-tokens",
        "4",
        "--prompt-tokens",
        "8",
        "--generation-tokens",
        "2",
        "--rounds",
        "1",
        "--dtype",
        "float32",
    ]
    claims = told_claims(*words, *sizes, *times)
    assert {claim["verdict"] for claim in claims} == {
        "too few"
    }  # six documents, one round, two windows
    assert len(claims) >= 10
    assert [one.claim for one in read(tmp_path / "claims.jsonl", ClaimRecord)] == [
        claim["claim"] for claim in claims
    ]
    story = (tmp_path / "paper.md").read_text()
    assert story.count("| skipped ") == 8
    assert (
        "fewer than 30 documents of a task, 5 timed rounds, 8 windows of text, or 6"
        " layers" in story
    )
    assert "tiny_letters, 0-shot, accuracy of 6 documents" in story
    assert story.index("## The paper's claims") < story.index("## Benchmarks")
    for claim in claims:
        assert claim["claim"] in story
    assert {path.name for path in tmp_path.glob("*.tex")} == {
        f"{name}-{ending}.tex"
        for name in ("benchmarks", "diagnostics", "prefill", "decode")
        for ending in ("last-kept", "last-skipped")
    } | {"claims.tex", "similarity.tex"}
    assert {"claims.csv", "similarity.csv", "averages.csv"} <= {
        path.name for path in tmp_path.glob("*.csv")
    }
    with open(tmp_path / "averages.csv") as file:
        assert len(list(csv.DictReader(file))) == 19
    assert "tiny_letters, 0-shot, accuracy of 6 documents" in (
        tmp_path / "benchmarks-last-kept.tex"
    ).read_text().replace("\\_", "_")
    for name in ("benchmarks", "diagnostics"):
        with open(tmp_path / f"{name}.csv") as file:
            assert len(list(csv.DictReader(file))) == len(
                lines.read_lines(tmp_path / f"{name}.jsonl")
            )
    checks = lines.read_lines(tmp_path / "diagnostics.jsonl")
    assert len({(r["variant"], r["fraction"], r["keep_last"]) for r in checks}) == 18
    assert {r["part"] for r in checks} == {"long texts", "passkey", "writing"}
    assert (tmp_path / "similarity.png").stat().st_size > 1000
    before = {
        path: path.read_bytes()
        for path in tmp_path.iterdir()
        if path.suffix in (".md", ".jsonl", ".csv")
    }
    assert told_claims(*words, *sizes, *times) == claims
    assert before == {path: path.read_bytes() for path in before}


COMMAND = """
from functools import partial
from lm_eval.tasks import TaskManager
from api import cli, tasks
tasks.TaskManager = partial(TaskManager, include_defaults=False)
cli.main()
"""


@pytest.mark.slow
@pytest.mark.any_transformers
@pytest.mark.parametrize("stage", ["diagnostics.jsonl", "times.jsonl"])
def test_killed_in_a_later_stage_the_command_goes_on(folders, tmp_path, stage):
    model, task_path = folders
    words = [
        "paper",
        model,
        "--out",
        tmp_path,
        "--tasks",
        "tiny_letters",
        "--task-path",
        task_path,
        "--limit",
        "6",
    ]
    words += [
        "--task-batch-size",
        "1",
        "--sequences",
        "2",
        "--length",
        "16",
        "--diagnostics",
        "--dtype",
        "float32",
    ]
    words += [
        "--prompt-tokens",
        "4",
        "--prompt-tokens",
        "8",
        "--generation-tokens",
        "2",
        "--rounds",
        "1",
    ]
    forked.kill_at(tmp_path / stage, 5, COMMAND, *words)
    assert not (tmp_path / "paper.md").exists()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    assert forked.run(COMMAND, *words).returncode == 0
    for path, held in before.items():
        assert path.read_bytes().startswith(held[: held.rfind(b"\n") + 1])
    for name, keys in {
        "diagnostics": ("part", "check"),
        "benchmarks": ("metric",),
        "times": ("prompt_tokens",),
    }.items():
        path = tmp_path / f"{name}.jsonl"
        found = [
            tuple(r[key] for key in ("variant", "fraction", "keep_last", *keys))
            for r in lines.read_lines(path)
        ]
        again = len(found) - len(set(found))
        whole = before.get(path, b"").count(b"\n")
        torn = set(
            found[whole - again : whole]
        )  # what was written of a group that was not all there
        assert torn == {each for each in found if found.count(each) > 1}, (
            "a record was written twice"
        )
        groups = {each[3] for each in torn}
        assert not torn or torn < {each for each in found if each[3] in groups}, (
            "a whole group was measured again"
        )
    assert "## What accuracy hides" in (tmp_path / "paper.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("own_tasks_only")
def test_a_disk_that_fills_up_is_one_line_and_what_is_finished_stays(
    folders, tmp_path, monkeypatch, capsys
):
    model, task_path = folders
    words = [
        "notall",
        "paper",
        model,
        "--out",
        tmp_path,
        "--tasks",
        "tiny_letters",
        "--task-path",
        task_path,
    ]
    words += [
        "--limit",
        "3",
        "--sequences",
        "2",
        "--length",
        "16",
        "--dtype",
        "float32",
        "--prompt-tokens",
        "4",
        "--generation-tokens",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    fills_up(monkeypatch, "times.jsonl")
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    said = capsys.readouterr().err.splitlines()[-1]
    assert leaving.value.code == 2
    assert said.startswith("error: cannot write")
    assert "No space left" in said
    assert len(lines.read_lines(tmp_path / "benchmarks.jsonl")) == 2 * 19
