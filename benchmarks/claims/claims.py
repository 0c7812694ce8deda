"""Ten claims of the field, as sentences that a number can decide, tested on a model:
which hold on it, which fail?

    python benchmarks/claims/claims.py --data DATA --out OUT   # 23 CPU minutes, less three claims
    python benchmarks/claims/claims.py --data DATA --out OUT --only last-mlp-kept similar-attentions
    python benchmarks/claims/claims.py --data DATA --out OUT --model GGUF --skip "last-blocks-tuned=no time"

Each claim names beforehand a statistic, a threshold and its side of it; the statistic's
95 % interval decides: `holds`, `fails`, or `inconclusive`. What is measured is kept in
OUT/measured.jsonl, and a run that is called again goes on from there; OUT/claims.jsonl
has a record a claim. Some are computed from committed records of the default model, and
take no time. A claim of your own is a function in testing.py and a line in CLAIMS. DATA
holds `wikitext2/wiki.train.first1MB.txt`, `wikitext2/wiki.test.raw` and
`c4/sample300.jsonl`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import testing
import torch
from bench import Bench, NotRun, Sizes
from pydantic import Field
from rules import Interval, Side, Verdict, verdict
from testing import Finding

from notall.files import write_whole
from notall.measuring.speed import machine
from notall.results.provenance import this_run
from notall.results.record import Amount, Count, Fact, Number
from notall.results.table import Column, number, table, with_interval, words
from notall.results.terminal import print_table
from notall.strict_json import Settings


@dataclass(frozen=True)
class Claim:
    """A sentence that holds where the whole interval of a statistic is on its side of a
    threshold.
    """

    name: str
    source: str
    statement: str
    statistic: str
    side: Side
    threshold: float
    test: Callable[[Bench], Finding]


CLAIMS = (
    Claim("text-over-way", "2604.24938", "the calibration text explains more of a set's loss than the way of choosing "
          "it", "eta squared of text less that of way, of held-out KL", "above", 0, testing.text_over_way),
    Claim("last-blocks-tuned", "2411.15558", "without the last fifth of the blocks, head and last three layers tuned, "
          "a model loses less than without as many by cosine, tuned alike",
          "NLL of the last less NLL of cosine's", "below", 0, testing.last_blocks_tuned),
    Claim("recovered-order", "NVIDIA Model-Optimizer", "a repair reorders sets: losses before and after it are hardly "
          "correlated", "Spearman of NLL added before and after a quick refit", "below", 0.5, testing.recovered_order),
    Claim("blind-to-retrieval", "2510.19861", "perplexity is blind to retrieval", "Spearman of NLL added on text and "
          "on answers to retrieve", "below", 0.5, testing.blind_to_retrieval),
    Claim("blind-to-reasoning", "2510.22228", "perplexity is blind to reasoning", "Spearman of NLL added on text and "
          "on GSM8K's answers", "below", 0.5, testing.blind_to_reasoning),
    Claim("ratio-predicts-acceptance", "2605.01106", "the ratio of perplexities predicts how much of a draft is "
          "accepted",
          "Spearman of original / skipped perplexity and acceptance", "above", 0.9, testing.ratio_and_acceptance),
    Claim("attention-per-byte", "2406.15786", "attentions lose less than as many bytes of MLPs",
          "NLL added, attentions less MLPs", "below", 0, testing.per_byte),
    Claim("attention-per-prefill-ms", "2407.15516", "attentions lose less than MLPs that save as much prefill time",
          "NLL added, attentions less MLPs", "below", 0, testing.per_prefill_ms),
    Claim("attention-per-decode-ms", "2407.15516", "attentions lose less than MLPs that save as much decode time",
          "NLL added, attentions less MLPs", "below", 0, testing.per_decode_ms),
    Claim("order-of-repairs", "2605.15491", "refit, ReplaceMe, Prune&Comp and NBL keep their order from set to set",
          "mean Spearman of a set's order with that of the others", "above", 0.9, testing.order_of_repairs),
    Claim("sum-ranks", "2602.00161", "the sum of what sublayers lose alone ranks plans by what they lose together",
          "Spearman of sum and joint NLL added", "above", 0.9, testing.sum_ranks),
    Claim("sum-is-size", "2602.00161", "that sum is within a quarter of what they lose together",
          "mean |ln(joint / sum)|", "below", 0.22, testing.sum_is_size),
    Claim("excited-skipped", "2602.00161", "one of the second to fifth set by a quadratic estimate loses less than the "
          "first", "NLL added, picked less first", "below", 0, testing.excited_skipped),
    Claim("excited-repaired", "2602.00161", "the same after a quick refit of each",
          "NLL added, picked less first", "below", 0, testing.excited_repaired),
    Claim("last-attention-kept", "2407.15516", "keeping the last attention does not raise the loss",
          "NLL added, kept less skipped", "below", 0, testing.last_attention_kept),
    Claim("last-mlp-kept", "2407.15516", "keeping the last MLP raises the loss", "NLL added, kept less skipped",
          "above", 0, testing.last_mlp_kept),
    Claim("last-block-kept", "2407.15516", "keeping the last block raises the loss", "NLL added, kept less skipped",
          "above", 0, testing.last_block_kept),
    Claim("similar-attentions", "2406.15786", "the less an attention turns the stream, the less is lost without it",
          "Spearman of 1 - cosine and NLL added", "above", 0.8, testing.similar_attentions),
    Claim("similar-mlps", "2406.15786", "the less an MLP turns the stream, the less is lost without it",
          "Spearman of 1 - cosine and NLL added", "above", 0.8, testing.similar_mlps),
)  # fmt: skip


class Answer(Fact):
    """A claim, what was found, the verdict, and where it comes from."""

    claim: str
    source: str
    statement: str
    model: str
    statistic: str
    side: Side
    threshold: Number
    verdict: Verdict
    found: Interval | None = None
    interval: str = ""  # how it was made
    items: Count = 0
    of: str = ""  # what the items are
    text: str = ""
    records: tuple[str, ...] = ()  # committed ones that it was computed from
    also: dict[str, Number] = Field(default_factory=dict)
    why: str = ""  # it was not run
    cpu_seconds: Amount = 0.0  # of all measurements that it reads; claims share some
    command: str
    date: str
    machine: Settings


COLUMNS: tuple[Column[Answer], ...] = (
    words("claim", lambda one: one.claim),
    words("source", lambda one: one.source),
    words("statistic", lambda one: one.statistic),
    with_interval(
        "found",
        lambda one: (
            (one.found.value, one.found.low, one.found.high) if one.found else None
        ),
    ),
    words("holds", lambda one: f"{one.side} {one.threshold:g}"),
    words("verdict", lambda one: one.verdict + (f": {one.why}" if one.why else "")),
    words("items", lambda one: f"{one.items} {one.of}"),
    number("CPU s", lambda one: one.cpu_seconds, ",.0f"),
)


def answered(claim: Claim, bench: Bench, about: Settings, why: str = "") -> Answer:
    """The claim tested, or why it was not."""
    told = {"claim": claim.name, "model": Path(bench.model_name).name, **about}
    told |= {
        name: getattr(claim, name)
        for name in ("source", "statement", "statistic", "side", "threshold")
    }
    bench.kept.used.clear()
    try:
        if why:
            raise NotRun(why)
        finding = claim.test(bench)
    except NotRun as reason:
        return Answer(verdict="not run", why=str(reason), **told)
    return Answer(
        verdict=verdict(finding.found, claim.threshold, claim.side), found=finding.found, interval=finding.how,
        items=finding.items, of=finding.of, text=finding.text, records=finding.records, also=finding.also,
        cpu_seconds=bench.kept.seconds(), **told,
    )  # fmt: skip


def write(path: Path, answers: Sequence[Answer]) -> list[Answer]:
    """All answers of a file with the new ones in their places, in the order of the
    claims.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    by_name = {
        one.claim: one for one in (*map(Answer.model_validate_json, lines), *answers)
    }
    found = [by_name[claim.name] for claim in CLAIMS if claim.name in by_name]
    write_whole(path, "".join(one.model_dump_json() + "\n" for one in found))
    return found


def main() -> None:
    names = [claim.name for claim in CLAIMS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=testing.RECORDED)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=", ".join(names),
    )
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="NAME=REASON",
        help="recorded as not run",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--windows",
        type=int,
        default=Sizes.windows,
        help="of 256 tokens, of each text to judge by",
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    skipped = {
        name: reason or "skipped"
        for name, _, reason in (one.partition("=") for one in given.skip)
    }
    bench = Bench.at(
        given.data, given.model, given.dtype, Sizes(windows=given.windows), given.out
    )
    for claim in CLAIMS:
        if claim.name in given.only:
            ran = this_run("python", "benchmarks/claims/claims.py")
            ran["machine"] = machine("cpu")
            answer = answered(claim, bench, ran, skipped.get(claim.name, ""))
            print(
                answer.model_dump_json(
                    include={"claim", "verdict", "found", "also", "cpu_seconds"}
                ),
                flush=True,
            )
            found = write(given.out / "claims.jsonl", [answer])
    print_table(table(f"Claims on {Path(given.model).name}", COLUMNS, found))


if __name__ == "__main__":
    main()
