"""Results folders as commands leave them, without a model: records of made-up figures,
and where they are written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from api import (
    BenchmarkRecord,
    BenchRecord,
    ClaimRecord,
    ComparisonRecord,
    ContinuationsRecord,
    DiagnosticsRecord,
    EvaluationRecord,
    Footprint,
    HealRecord,
    LeaveOneOutRecord,
    Ledger,
    MeasuredRecord,
    ParetoRecord,
    Provenance,
    Quality,
    Quartiles,
    Record,
    RefitRecord,
    SearchCost,
    SearchRecord,
    SimilarityRecord,
    SpeedCheck,
    SweepRecord,
    TaskScore,
    Timed,
    TimesRecord,
    facts_Times,
    records_lines,
)
from notall import Plan

LAYERS = 10
ABOUT = Provenance(
    what={"model": "tiny", "revision": "none", "dtype": "float32", "text": "t"},
    where={"device": "cpu", "versions": {"torch": "2"}},
)
SHAPED = Provenance.of(ABOUT, fingerprint=f"llama-{LAYERS + 2}x64-00000000")
NASTY = (
    "<script>window.pwned = 1</script></script><img src=x onerror='window.pwned = 1'>"
    " \"quoted' {{ 7 * 7 }} `${1}` \u202e\u05e9\u05dc\u05d5\u05dd"
    " \u0645\u0631\u062d\u0628\u0627 " + "x" * 10_000
)
FASTER = {
    "dense": 0,
    "attention": 0.5,
    "mlp": 0.8,
    "block": 1.2,
}  # by how much, were all of them skipped
Rows = list[dict[str, Any]]  # lines of a file of no kind of ours


# --- facts
# --------------------------------------------------------------------------------------


def quality(lost: float, **changes: Any) -> Quality:
    figures = {
        "nll": 2.5 + lost,
        "nll_se": 0.1,
        "delta_nll": lost,
        "delta_nll_se": abs(lost) / 10,
        "perplexity": 12.2,
        "kl": lost,
        "kl_se": 0.01,
        "top1_agreement": 0.5,
        "top1_agreement_se": 0.01,
        "sequences": 8,
    }
    return Quality(**figures | changes)


def spread(median: float) -> Quartiles:
    return Quartiles(median=median, low=0.95 * median, high=1.1 * median, n=5)


def scaled(spread: Quartiles, factor: float) -> Quartiles:
    ends = {name: factor * getattr(spread, name) for name in ("median", "low", "high")}
    return spread.model_copy(update=ends)


def times(speedup: float) -> facts_Times:
    faster = spread(speedup)
    return facts_Times(
        prefill_ms=spread(100 / speedup),
        decode_ms_per_token=spread(50 / speedup),
        speedup_prefill=faster,
        speedup_decode=faster,
    )


def footprint(plan: Plan, weight_bytes: int = 4_000_000) -> Footprint:
    """A kind's weights of a layer count once, whichever of the two is skipped."""
    layers = len({*plan.attention, *plan.mlp})
    return Footprint(
        params=1_000_000 - layers * 10_000,
        weight_bytes=weight_bytes - layers * 40_000,
        kv_bytes_per_token=1000 - 100 * len(plan.attention),
    )


def deepest(variant: str, fraction: float, *, keep_last: bool = False) -> Plan:
    last = LAYERS - keep_last
    window = range(last - round(fraction * LAYERS), last)
    return Plan(
        window if variant in ("attention", "block") else (),
        window if variant in ("mlp", "block") else (),
    )


# --- records
# --------------------------------------------------------------------------------------


def configured(variant: str, fraction: float, keep_last: bool) -> dict[str, Any]:
    plan = deepest(variant, fraction, keep_last=keep_last)
    return {
        "plan": plan,
        "variant": variant,
        "fraction": fraction,
        "keep_last": keep_last,
    }


def record(
    variant: str, fraction: float, keep_last: bool, lost: float, **changes: Any
) -> SweepRecord:
    row = configured(variant, fraction, keep_last)
    return SweepRecord(
        **row,
        quality=quality(lost, **changes),
        times=times(1 + fraction * FASTER[variant]),
        footprint=footprint(row["plan"]),
        provenance=ABOUT,
    )


def all_records(**changes: Any) -> list[SweepRecord]:
    """A grid; `changes` are of what is skipped."""
    rows = [record("dense", 0.0, False, 0.0)]
    for variant, lost in (("attention", 0.2), ("mlp", 1.1), ("block", 3.0)):
        for fraction in (0.1, 0.25, 0.33):
            rows += [
                record(
                    variant, fraction, keep, lost * fraction * (8 - 3 * keep), **changes
                )
                for keep in (False, True)
            ]
    return rows


def similarity() -> list[SimilarityRecord]:
    return [
        SimilarityRecord(
            layer=layer,
            kind=kind,
            cosine=0.5 + 0.04 * layer,
            cosine_se=0.01,
            provenance=ABOUT,
        )
        for layer in range(LAYERS)
        for kind in ("block", "attention", "mlp")
    ]


def samples(
    prompt: str = "One, two,", said: str = "three."
) -> list[ContinuationsRecord]:
    rows = (("dense", 0.0, False), ("attention", 0.1, False))
    return [
        ContinuationsRecord(
            **configured(*row), continuations={prompt: said}, provenance=ABOUT
        )
        for row in rows
    ]


def alone() -> list[LeaveOneOutRecord]:
    """What leaving out each sublayer costs, as a sweep writes it."""
    return [
        LeaveOneOutRecord(
            sublayer=f"{kind}.{i}",
            delta_nll=0.1 * i,
            delta_nll_se=0.01,
            sequences=2,
            provenance=ABOUT,
        )
        for kind in ("attn", "mlp")
        for i in range(LAYERS)
    ]


def evaluations(
    layers: int = LAYERS, batches: int | str = "all"
) -> list[EvaluationRecord]:
    """What a search or a comparison evaluated: the original model, each attention
    alone, and two together.
    """
    sets = [(), *((f"attn.{i}",) for i in range(layers)), ("attn.1", "attn.2")]
    costs = [1.0, *(1 + 0.1 * i for i in range(layers)), 9.0]
    spent = SearchCost(evaluations=1, executions=2.0, seconds=0.1)
    return [
        EvaluationRecord(skipped=names, batches=batches, cost=cost, spent=spent)
        for names, cost in zip(sets, costs)
    ]


def compared(
    criterion: str, space: str, count: int, lost: float, **changes: Any
) -> ComparisonRecord:
    window = range(LAYERS - count, LAYERS)
    plan = Plan(window)
    task = {
        "task": "arc_easy",
        "metric": "acc",
        "num_fewshot": 0,
        "documents": 40,
        "p_value": 0.5,
    }
    fields = {
        "plan": plan,
        "criterion": criterion,
        "objective": "kl",
        "space": space,
        "count": count,
        "order": tuple((f"attn.{index}",) for index in reversed(window)),
        "calibration_tokens": 512,
        "spent": SearchCost(
            evaluations=10 * count, executions=20.0 * count, seconds=1.5
        ),
        "forwards": 2.5 * count,
        "quality": quality(lost),
        "footprint": footprint(plan),
        "times": times(1.05),
        "tasks": (
            TaskScore(
                **task, value=0.5 - 0.01 * count, delta=-0.01 * count, delta_se=0.02
            ),
        ),
        "provenance": SHAPED,
    }
    return ComparisonRecord(**fields | changes)


def all_compared() -> list[ComparisonRecord]:
    """Two spaces, three ways to choose, two counts."""
    ways = (("search", 0.1), ("cosine", 0.3), ("deepest", 0.9))
    return [
        compared(way, space, count, lost * count)
        for space, counts in (("attention", (2, 4)), ("portable", (2, 6)))
        for way, lost in ways
        for count in counts
    ]


def chosen(count: int, **changes: Any) -> SearchRecord:
    window = range(LAYERS - count, LAYERS)
    check = SpeedCheck(
        predicted_ms=80.0,
        measured_ms=78.0,
        predicted_speedup=1.2,
        measured_speedup=spread(1.25),
    )
    fields = {
        "plan": Plan(window),
        "chosen": f"search by kl: {count} attentions",
        "order": tuple((f"attn.{index}",) for index in reversed(window)),
        "dense_cost": 0.0,
        "cost": 0.25,
        "spent": SearchCost(
            evaluations=10 * count, executions=20.0 * count, seconds=1.5
        ),
        "forwards": 2.5 * count,
        "in_time": True,
        "quality": quality(0.2),
        "check": check,
        "provenance": SHAPED,
    }
    return SearchRecord(**fields | changes)


def measured(text: str, model: str, lost: float, **changes: Any) -> MeasuredRecord:
    """What a plan of three attentions loses on a text, in one of its states."""
    fields = {
        "text": text,
        "model": model,
        "plan": deepest("attention", 0.33),
        "provenance": SHAPED,
    }
    return MeasuredRecord(**fields | {"quality": quality(lost)} | changes)


def all_measured(
    before: str = "skipped", after: str = "repaired"
) -> list[MeasuredRecord]:
    """On two texts."""
    return [
        measured(text, model, lost * share)
        for text, lost in (("prose, other windows", 0.4), ("book.txt", 0.8))
        for model, share in ((before, 1), (after, 0.25))
    ]


def refits() -> list[RefitRecord]:
    """Of what stands before a gap and behind it; one was left alone."""
    left = {"attn.5": 0.9, "mlp.5": 0.7, "mlp.6": 0.8, "attn.10": 1.0, "mlp.10": 0.95}
    return [
        RefitRecord(
            sublayers=(name,), left=part, ridge=None if part == 1 else 0.3, seconds=0.1
        )
        for name, part in left.items()
    ]


def looks() -> list[HealRecord]:
    """How far a healing was."""
    far = (("repaired", 0, 0.4), ("healed", 512, 0.3), ("healed", 1024, 0.25))
    return [
        HealRecord(model=of, tokens=tokens, held_out_kl=kl, seconds=60 * tokens / 512)
        for of, tokens, kl in far
    ]


def benched(
    variant: str = "attention", weight_bytes: int = 4_000_000, **changes: Any
) -> BenchRecord:
    """The deepest third of a kind, timed beside the original model; of none of them the
    original model alone.
    """
    plan = deepest(variant, 0.33 * (variant != "dense"))
    skipped = Timed(
        times=times(1 + 0.33 * FASTER[variant]), footprint=footprint(plan, weight_bytes)
    )
    fields = {
        "plan": plan,
        "prompt_tokens": 128,
        "generation_tokens": 32,
        "concurrency": 1,
        "rounds": 5,
        "dense": Timed(times=times(1.0), footprint=footprint(Plan(), weight_bytes)),
        "skipped": skipped if plan else None,
        "provenance": ABOUT,
    }
    return BenchRecord(**fields | changes)


def all_benched() -> list[BenchRecord]:
    """Of two models."""
    return [benched(), benched("block", 8_000_000, concurrency=4)]


# --- of the paper's evaluation
# --------------------------------------------------------------------------------------


def grid() -> list[dict[str, Any]]:
    return [
        configured(row.variant, row.fraction, row.keep_last) for row in all_records()
    ]


def benchmarks(documents: int = 40) -> list[BenchmarkRecord]:
    """Two benchmarks of the paper's grid."""
    score = {
        "metric": "acc,none",
        "num_fewshot": 0,
        "documents": documents,
        "value_se": 0.1,
    }
    score |= {
        "delta_se": 0.05,
        "p_value": 0.04,
        "higher_is_better": True,
        "provenance": ABOUT,
    }
    return [
        BenchmarkRecord(**row, **score, task=task, value=0.7 + lost, delta=lost)
        for task in ("arc", "boolq")
        for row in grid()
        for lost in [-0.2 * (row["variant"] != "dense")]
    ]


def timed() -> list[TimesRecord]:
    """At two prompt lengths; at the shorter one every plan decodes three times as fast
    as at the longer.
    """
    return [
        TimesRecord(
            **configured(row.variant, row.fraction, row.keep_last),
            prompt_tokens=prompt,
            concurrency=1,
            asked_concurrency=1,
            times=row.times.model_copy(
                update={"speedup_decode": scaled(row.times.speedup_decode, factor)}
            ),
            footprint=row.footprint,
            provenance=ABOUT,
        )
        for prompt, factor in ((512, 1), (128, 3))
        for row in all_records()
    ]


def checks(**changes: Any) -> list[DiagnosticsRecord]:
    """At two depths of long texts, and a passkey."""
    about = {
        "part": "p",
        "value": 3.0,
        "value_se": 0.1,
        "delta_se": 0.1,
        "p_value": 0.5,
        "higher_is_better": False,
    }
    return [
        DiagnosticsRecord(
            **configured(row.variant, row.fraction, row.keep_last),
            **about | {"delta": row.quality.delta_nll + more} | changes,
            check=check,
            provenance=ABOUT,
        )
        for row in all_records()[1:]
        for check, more in (
            ("NLL at 0 to 63", 0.1),
            ("NLL at 64 to 127", -0.1),
            ("passkey at 256", 9.0),
        )
    ]


def claims() -> list[ClaimRecord]:
    told = (
        ("one", "holds", "1.00× [1.00, 1.00]"),
        ("a | b", "does not hold", "+0.1 ± 0.2"),
        ("three", "inconclusive", ""),
        ("four", "inconclusive", "+0.1"),
    )
    return [
        ClaimRecord(claim=name, verdict=verdict, here=here, provenance=ABOUT)
        for name, verdict, here in told
    ]


def engines() -> list[ParetoRecord]:
    """The original model, quantised, and less four attentions, in an engine."""
    figures = {
        "nll_se": 0.1,
        "bits_per_byte": 0.9,
        "bits_per_byte_se": 0.01,
        "delta_bits_se": 0.001,
        "windows": 8,
    }
    figures |= {
        "tokens": 512,
        "memory_bytes": 5_000_000,
        "rounds": 5,
        "provenance": ABOUT,
    }
    rows = (
        ("dense", "F16", 1.0, 0.0, True),
        ("dense", "Q4", 1.5, 0.05, True),
        ("less 4 attentions", "Q4", 1.6, 0.3, False),
    )
    return [
        ParetoRecord(
            model=model,
            repaired=False,
            type=kind,
            skipped="" if model == "dense" else "attn.5 attn.6 attn.7 attn.8",
            nll=2.5 + lost,
            delta_nll=lost,
            delta_nll_se=lost / 10,
            delta_bits=lost / 4,
            file_bytes=int(4_000_000 / speedup),
            times=times(speedup),
            best=best,
            **figures,
        )
        for model, kind, speedup, lost, best in rows
    ]


# --- folders
# --------------------------------------------------------------------------------------


def write(
    folder: Path,
    *records: Record,
    about: Provenance = ABOUT,
    name: str | None = None,
    **foreign: Rows,
) -> Path:
    """A folder with records, each in the file of its kind, and lines of other files, by
    their names.
    """
    kinds: dict[type[Record], list[Record]] = {}
    for one in records:
        kinds.setdefault(type(one), []).append(one)
    for kind, some in kinds.items():
        Ledger(folder, kind, about if kind.headed else None, name=name).add(*some)
    for file, rows in foreign.items():
        records_lines.append(folder / f"{file}.jsonl", *rows)
    return folder


def write_sweep(folder: Path, records: Sequence[SweepRecord] = ()) -> Path:
    return write(folder, *(records or all_records()), *similarity(), *samples())


def write_comparison(folder: Path, records: Sequence[ComparisonRecord] = ()) -> Path:
    """With what each criterion evaluated, also on a part of its text."""
    write(folder, *(records or all_compared()))
    by_kl = Provenance.of(ABOUT, objective="kl")
    write(
        folder, *evaluations(), about=by_kl, name="evaluations/leave-one-out-kl.jsonl"
    )
    return write(
        folder, *evaluations(3, 2), about=by_kl, name="evaluations/search-kl.jsonl"
    )


def write_search(folder: Path, *records: SearchRecord) -> Path:
    write(folder, *evaluations(), about=Provenance.of(ABOUT, objective="kl"))
    return write(folder, *(records or (chosen(2), chosen(3, in_time=False))))


def write_repair(folder: Path, measured: Sequence[MeasuredRecord] = ()) -> Path:
    return write(folder, *(measured or all_measured()), *refits())


def write_healing(folder: Path) -> Path:
    return write(folder, *all_measured("repaired", "healed"), *looks())


def write_paper(folder: Path, *, diagnostics: bool = False) -> Path:
    """As `notall paper` leaves them: benchmarks, times, claims."""
    return write(
        folder, *benchmarks(), *timed(), *claims(), *(checks() if diagnostics else ())
    )


WRITERS: Mapping[str, Any] = {
    "sweep": write_sweep,
    "compare": write_comparison,
    "search": write_search,
    "bench": lambda folder: write(folder, *all_benched()),
    "repair": write_repair,
    "heal": write_healing,
    "eval": lambda folder: write(folder, measured("prose", "skipped", 0.4)),
    "paper": lambda folder: write_paper(folder, diagnostics=True),
    "pareto": lambda folder: write(folder, *engines()),
}
HOSTILE = Provenance(what={"model": NASTY, "text": NASTY, NASTY[:40]: NASTY})


def write_nasty(folder: Path) -> Path:
    """A sweep in which every text is hostile."""
    records = [one.model_copy(update={"provenance": HOSTILE}) for one in all_records()]
    other = [
        {"name": NASTY, "value": 1.0, NASTY[:60]: NASTY},
        {"name": "=1+1", "value": None},
    ]
    said = [
        one.model_copy(update={"provenance": HOSTILE}) for one in samples(NASTY, NASTY)
    ]
    return write(folder, *records, *said, other=other)


def write_nasty_comparison(folder: Path) -> Path:
    """A comparison in which every name is hostile."""
    score = {"task": NASTY, "metric": NASTY, "num_fewshot": 0, "documents": 9}
    task = TaskScore(**score, value=0.5, delta=0.1, delta_se=0.1)
    named = {"objective": NASTY, "provenance": HOSTILE, "tasks": (task,)}
    rows = [compared(NASTY, NASTY, count, 0.1 * count, **named) for count in (2, 4)]
    write(
        folder,
        *evaluations(),
        about=Provenance.of(ABOUT, objective=NASTY),
        name="evaluations/leave-one-out-x.jsonl",
    )
    return write_comparison(folder, [*rows, compared("cosine", "attention", 2, 0.3)])
