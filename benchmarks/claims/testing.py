"""The tests of the claims, each of which answers a statistic with its interval."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from itertools import chain, combinations
from pathlib import Path

import numpy as np
from bench import CALIBRATION, JUDGED, SEEDS, WAYS, Bench, NotRun
from rules import (
    Floats,
    Interval,
    agreement,
    bootstrap,
    correlated,
    eta_squared,
    paired,
    share_of_rows_less_columns,
    spearman,
)

from notall import Plan
from notall.choosing.space import plan_of
from notall.strict_json import Settings

ROOT = Path(__file__).parents[2]
RECORDED = "smollm2"  # the model of the committed records
LOO = "benchmarks/serving/leave-one-out-smollm2/correlations.jsonl"
REPAIRS = "benchmarks/repairs/results-3c67b3cf.jsonl"
TIMES = "benchmarks/paper/times.jsonl"
METHODS = ("refit", "replaceme", "prune-and-comp", "nbl")
FRACTIONS = (0.1, 0.25, 0.33)  # of 2407.15516
MLPS, PAIRS, ALIKE = (
    8,
    4,
    0.15,
)  # most MLPs against attentions, sets of either, and how far off their sizes are
MOST_SETS = 10_000_000  # to go through for excited states
EXCITED = 4
PAIRED = "Student's t over windows, paired"
OVER_PLANS = "bootstrap over plans"


@dataclass(frozen=True)
class Finding:
    """A statistic with its interval, how that was made, of how many items of which
    kind, and on how much text.
    """

    found: Interval
    how: str
    items: int
    of: str
    text: str
    records: tuple[str, ...] = ()
    also: dict[str, float] = field(default_factory=dict)


def recorded(bench: Bench, name: str) -> list[Settings]:
    """The rows of a committed record. Raises `NotRun` for another model than theirs."""
    if bench.model_name != RECORDED:
        raise NotRun(f"{name} is of {RECORDED}")
    return [
        json.loads(line)
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
    ]


def judged(bench: Bench) -> str:
    return f"{bench.sizes.in_words} of {' and of '.join(JUDGED)}"


def text_over_way(bench: Bench) -> Finding:
    sets = [[bench.chosen(text, seed) for seed in SEEDS] for text in CALIBRATION]
    plans = [by_way[way] for of_text in sets for way in WAYS for by_way in of_text]
    shape = len(CALIBRATION), len(WAYS), len(SEEDS), -1
    losses = bench.losses(plans)
    by_kl, by_nll = losses.kl.reshape(shape), losses.added.reshape(shape)
    text, way, together, seed = eta_squared(by_kl.mean(3)).tolist()
    nll = eta_squared(by_nll.mean(3))
    # one poor way may be most of the variance
    others = share_of_rows_less_columns(np.delete(by_kl, WAYS.index("fisher"), axis=1))
    also = {
        "text": text,
        "way": way,
        "interaction": together,
        "windows to choose by": seed,
    }
    also |= {
        f"KL by {name}": float(by_kl[:, number].mean())
        for number, name in enumerate(WAYS)
    }
    also |= {
        f"KL on {name}": float(by_kl[number].mean())
        for number, name in enumerate(CALIBRATION)
    }
    also |= {
        f"without fisher, {end}": getattr(others, end)
        for end in ("value", "low", "high")
    }
    also |= {"by NLL": float(nll[0] - nll[1]), "different sets": len(set(plans))}
    return Finding(
        share_of_rows_less_columns(by_kl),
        "bootstrap over the seeds of each cell and over windows",
        len(plans),
        "sets",
        f"chosen by {bench.sizes.to_choose} windows of {bench.sizes.length} tokens;"
        f" {judged(bench)}",
        also=also,
    )


def last_blocks_tuned(bench: Bench) -> Finding:
    cosine = bench.chosen(CALIBRATION[0], 0, "block", ("cosine",))["cosine"]
    count = len(cosine.attention)
    deepest = range(bench.blocks - count, bench.blocks)
    last = Plan(deepest, deepest)
    before = bench.losses([last, cosine]).added.mean(1).tolist()
    differences = bench.tuned(last) - bench.tuned(cosine)
    tokens = 2 * bench.sizes.steps * bench.sizes.length
    return Finding(
        paired(differences.tolist()),
        PAIRED,
        len(differences),
        "windows",
        f"tuned on {tokens:,} tokens; {judged(bench)}",
        also={
            "blocks": count,
            "last, untuned": before[0],
            "cosine, untuned": before[1],
        },
    )


def recovered_order(bench: Bench) -> Finding:
    chosen = chain.from_iterable(
        bench.chosen(text, SEEDS[0]).values() for text in CALIBRATION
    )
    sets = [*dict.fromkeys(chosen)]
    rng = np.random.default_rng(1)
    inner = range(2, bench.blocks - 1)
    drawn = min(bench.skipped, len(inner))
    sets = [
        *dict.fromkeys(
            sets[:5]
            + [Plan(rng.choice(inner, drawn, replace=False).tolist()) for _ in range(5)]
        )
    ]
    before, after = (
        bench.losses(sets, repaired=repaired).added.mean(1)
        for repaired in (False, True)
    )
    best, other = (int(one.argmin()) for one in (before, after))
    half = before <= np.median(before)
    return Finding(
        correlated(before, after),
        "bootstrap over sets",
        len(sets),
        "sets",
        f"repaired on {bench.sizes.to_repair * bench.sizes.length:,} tokens;"
        f" {judged(bench)}",
        also={
            "among the better half": spearman(before[half], after[half]),
            "best before, repaired": float(after[best]),
            "best after, repaired": float(after[other]),
            "the same is best": float(best == other),
        },
    )


def blind_to_retrieval(bench: Bench) -> Finding:
    return _blind(
        bench, "passkeys and retrieval", "nats/answer", "64 items of four checks"
    )


def blind_to_reasoning(bench: Bench) -> Finding:
    return _blind(bench, "gsm8k", "nats/token", "16 reference answers of GSM8K")


def _blind(bench: Bench, check: str, unit: str, items: str) -> Finding:
    rows = [
        row
        for row in recorded(bench, LOO)[1:]
        if (row["check"], row["unit"]) == (check, unit)
    ]
    by = {row["among"]: row for row in rows}
    value, low, high = by["all"]["nll"]
    return Finding(
        Interval(value=value, low=low, high=high),
        "bootstrap over sublayers",
        by["all"]["sublayers"],
        "sublayers",
        f"8 windows of 512 tokens of two texts; {items}",
        (LOO,),
        {
            "attentions": by["attention"]["nll"][0],
            "MLPs": by["MLP"]["nll"][0],
            "between halves of the items": by["all"]["halves"],
        },
    )


def ratio_and_acceptance(bench: Bench) -> Finding:
    plans = bench.random_plans()
    added = bench.losses(plans, CALIBRATION[:1]).added.mean(1)
    accepted = bench.acceptance(plans).mean(1)
    near = added < math.log(2)
    sizes = bench.sizes
    return Finding(
        correlated(
            -added, accepted
        ),  # ranks of the ratio original / skipped are those of -added
        OVER_PLANS,
        len(plans),
        "plans",
        f"{sizes.prompts} texts of {sizes.new} tokens; {sizes.in_words} of"
        f" {CALIBRATION[0]}",
        also={
            "plans with at most twice the perplexity": float(near.sum()),
            "among them": spearman(-added[near], accepted[near]),
            "lowest acceptance": float(accepted.min()),
            "highest acceptance": float(accepted.max()),
        },
    )


def per_byte(bench: Bench) -> Finding:
    weights = {name: sum(part.weight_bytes for part in bench.structure.sublayers if part.kind == kind)
               for name, kind in (("attention", "attention"), ("mlp", "mlp"))}  # fmt: skip
    return _cheaper(bench, weights["mlp"] / weights["attention"])


def per_prefill_ms(bench: Bench) -> Finding:
    return _cheaper(bench, _times_as_long(bench, "prefill_ms", 512), (TIMES,))


def per_decode_ms(bench: Bench) -> Finding:
    return _cheaper(bench, _times_as_long(bench, "decode_ms_per_token", 128), (TIMES,))


def _times_as_long(bench: Bench, phase: str, prompt: int) -> float:
    """An MLP's milliseconds over an attention's, by what skipping a third of either
    saves.
    """
    saved = {}
    rows = [row for row in recorded(bench, TIMES) if row["prompt_tokens"] == prompt]
    (original,) = (
        row["times"][phase]["median"] for row in rows if row["variant"] == "dense"
    )
    for row in rows:
        if (
            row["variant"] in ("attention", "mlp")
            and row["fraction"] == FRACTIONS[-1]
            and not row["keep_last"]
        ):
            saved[row["variant"]] = (original - row["times"][phase]["median"]) / len(
                row["plan"][row["variant"]]
            )
    return float(saved["mlp"] / saved["attention"])


def _cheaper(bench: Bench, ratio: float, records: tuple[str, ...] = ()) -> Finding:
    """NLL added without attentions less that without as many bytes or milliseconds of
    MLPs, each those that lose least.

    Sublayers are ranked by their loss alone on other text.
    """
    singles = {name: float(added.mean()) for name, added in bench.singles().items()}
    ranked = {kind: [name for name in sorted(singles, key=singles.__getitem__) if name.startswith(kind)]
              for kind in ("attn", "mlp")}  # fmt: skip
    pairs = as_large(ratio, bench.blocks // 2)
    if not pairs:
        raise NotRun("no few attentions are as large as some MLPs")
    sets = [
        [plan_of(ranked["attn"][:attentions]), plan_of(ranked["mlp"][:mlps])]
        for attentions, mlps in pairs
    ]
    added = bench.losses([*chain(*sets)]).added.reshape(len(sets), 2, -1)
    differences = added[:, 0] - added[:, 1]
    also = {"attentions per MLP": ratio}
    for (attentions, mlps), one in zip(pairs, differences):
        also[f"{attentions} attentions against {mlps} MLPs"] = float(one.mean())
    by_window = differences.mean(0)
    text = f"ranked by {bench.sizes.in_words} of {CALIBRATION[0]}; {judged(bench)}"
    return Finding(
        paired(by_window.tolist()),
        PAIRED,
        len(by_window),
        "windows",
        text,
        records,
        also,
    )


def as_large(ratio: float, most: int) -> list[tuple[int, int]]:
    """The first numbers of attentions, up to `most`, and of MLPs that are as large, one
    being `ratio` attentions.
    """
    pairs = [(round(ratio * mlps), mlps) for mlps in range(1, MLPS + 1)]
    alike = [
        (few, mlps)
        for few, mlps in pairs
        if 0 < few <= most and abs(few / (ratio * mlps) - 1) <= ALIKE
    ]
    return alike[:PAIRS]


def order_of_repairs(bench: Bench) -> Finding:
    rows = recorded(bench, REPAIRS)
    texts = sorted({row["text"] for row in rows})
    losses = {
        (row["set"], row["text"], row["repair"]): row["delta_nll"] for row in rows
    }
    sets = [one for one in dict.fromkeys(row["set"] for row in rows)
            if all((one, text, method) in losses for text in texts for method in METHODS)]  # fmt: skip
    tables = [
        np.array([[losses[one, text, method] for method in METHODS] for one in sets])
        for text in texts
    ]
    by_set = np.mean([agreement(table) for table in tables], axis=0)
    best = [float((table.argmin(1) == 0).mean()) for table in tables]
    return Finding(
        bootstrap(lambda places: float(by_set[places].mean()), len(sets)),
        "bootstrap over sets",
        len(sets),
        "sets",
        f"{rows[0]['tokens']:,} tokens to fit; {rows[0]['windows']} windows of 512"
        " tokens of two texts",
        (REPAIRS,),
        {
            f"refit is best, {Path(text).stem.removesuffix('.test')}": share
            for text, share in zip(texts, best)
        },
    )


def sum_ranks(bench: Bench) -> Finding:
    total, joint = _sums(bench)
    return _additive(bench, correlated(total, joint), total, joint)


def sum_is_size(bench: Bench) -> Finding:
    total, joint = _sums(bench)
    positive = (total > 0) & (joint > 0)
    if not positive.any():
        raise NotRun("no plan loses anything")
    off = np.abs(np.log(joint[positive] / total[positive]))
    return _additive(
        bench,
        bootstrap(lambda places: float(off[places].mean()), len(off)),
        total,
        joint,
    )


def _sums(bench: Bench) -> tuple[Floats, Floats]:
    """Of random plans the sum of what their sublayers lose alone, and what they lose
    together, on the same windows.
    """
    plans, singles = bench.random_plans(), bench.singles()
    joint = bench.losses(plans, CALIBRATION[:1]).added.mean(1)
    return (
        np.array([sum(singles[name].mean() for name in plan.names) for plan in plans]),
        joint,
    )


def _additive(bench: Bench, found: Interval, total: Floats, joint: Floats) -> Finding:
    sizes = np.array([len(plan) for plan in bench.random_plans()])
    also = {f"median joint / sum, {size} sublayers": float(np.median((joint / total)[sizes == size]))
            for size in sorted({*sizes.tolist()})}  # fmt: skip
    return Finding(
        found,
        OVER_PLANS,
        len(joint),
        "plans",
        f"{bench.sizes.in_words} of {CALIBRATION[0]}",
        also=also,
    )


def excited_skipped(bench: Bench) -> Finding:
    return _excited(bench, repaired=False)


def excited_repaired(bench: Bench) -> Finding:
    return _excited(bench, repaired=True)


def _excited(bench: Bench, repaired: bool) -> Finding:
    """What the best of the second to fifth set loses less the first; picked on even
    windows, judged on odd ones.
    """
    alone, together = bench.quadratic()
    sets = [Plan(one) for one in lowest(alone, together, bench.skipped, 1 + EXCITED)]
    added = bench.losses(sets, repaired=repaired).added
    picked = 1 + int(added[1:, ::2].mean(1).argmin())
    differences = added[picked, 1::2] - added[0, 1::2]
    fitted = (
        f"; repaired on {bench.sizes.to_repair * bench.sizes.length:,} tokens"
        * repaired
    )
    also = {
        f"set {number + 1}": float(one.mean()) for number, one in enumerate(added)
    } | {"picked": picked + 1}
    return Finding(
        paired(differences.tolist()),
        PAIRED,
        len(differences),
        "windows",
        judged(bench) + fitted,
        also=also,
    )


def lowest(alone: Floats, together: Floats, size: int, count: int) -> list[list[int]]:
    """The `count` sets of `size` with the least sum of single and pairwise effects: all
    sets are gone through.
    """
    sets = math.comb(len(alone), size)
    if sets > MOST_SETS:
        raise NotRun(f"{sets:,} sets are too many to go through")
    flat = chain.from_iterable(combinations(range(len(alone)), size))
    members = np.fromiter(flat, np.uint8, sets * size).reshape(sets, size)
    energy = alone[members[:, 0]].copy()
    for place in range(1, size):
        energy += alone[members[:, place]]
        for before in range(place):
            energy += together[members[:, before], members[:, place]]
    return [
        list(map(int, members[number]))
        for number in np.argsort(energy, kind="stable")[:count]
    ]


def last_mlp_kept(bench: Bench) -> Finding:
    return _last_kept(bench, attentions=False, mlps=True)


def last_block_kept(bench: Bench) -> Finding:
    return _last_kept(bench, attentions=True, mlps=True)


def last_attention_kept(bench: Bench) -> Finding:
    return _last_kept(bench, attentions=True, mlps=False)


def _last_kept(bench: Bench, attentions: bool, mlps: bool) -> Finding:
    """NLL added with the last layer kept less that with it skipped, as many from the
    top; the mean over fractions.
    """
    counts = [max(1, round(fraction * bench.blocks)) for fraction in FRACTIONS]
    runs = [
        [range(end - count, end) for end in (bench.blocks - 1, bench.blocks)]
        for count in counts
    ]
    plans = [
        Plan(run if attentions else (), run if mlps else ())
        for pair in runs
        for run in pair
    ]
    added = bench.losses(plans).added.reshape(len(counts), 2, -1)
    by_count = added[:, 0] - added[:, 1]
    also = {
        f"{count} of {bench.blocks}": float(one.mean())
        for count, one in zip(counts, by_count)
    }
    differences = by_count.mean(0)
    return Finding(
        paired(differences.tolist()),
        PAIRED,
        len(differences),
        "windows",
        judged(bench),
        also=also,
    )


def similar_attentions(bench: Bench) -> Finding:
    return _similar(bench, "attn")


def similar_mlps(bench: Bench) -> Finding:
    return _similar(bench, "mlp")


def _similar(bench: Bench, kind: str) -> Finding:
    """1 - cosine against the NLL added without the sublayer alone, on the same
    windows.
    """
    singles, cosines = bench.singles(), bench.cosines()
    names = [name for name in singles if name.startswith(kind)]
    changed, added = (
        np.array(one)
        for one in zip(*((1 - cosines[name], singles[name].mean()) for name in names))
    )
    inner = slice(2, -1)
    return Finding(
        correlated(changed, added),
        "bootstrap over sublayers",
        len(names),
        "sublayers",
        f"{bench.sizes.in_words} of {CALIBRATION[0]}",
        also={
            "without the first two and the last": spearman(changed[inner], added[inner])
        },
    )
