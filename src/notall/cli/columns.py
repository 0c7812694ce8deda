"""The columns of each table: first those that say which row it is, then the rest, the most important first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..reporting.console import Column, number, plain, probability, size, with_error, with_spread

if TYPE_CHECKING:
    from ..choosing.choice import ChosenPlan

QUALITY: list[Column] = [
    with_error("delta_nll", "NLL added"),
    with_error("kl", "KL"),
    with_error("top1_agreement", "top-1 agreement", ".2f"),
    number("perplexity", "perplexity", ".1f"),
    with_error("nll", "NLL"),
]
SPEEDS: list[Column] = [
    with_spread("speedup_decode", "decode speedup", ".2f"),
    with_spread("speedup_prefill", "prefill speedup", ".2f"),
    with_spread("decode_ms_per_token", "decode ms/token"),
    with_spread("prefill_ms", "prefill ms"),
]
WEIGHTS: list[Column] = [
    size("weight_bytes", "weights"),
    size("kv_bytes_per_token", "KV/token"),
    number("params", "parameters", ","),
]
TIMES: list[Column] = [
    with_spread("speedup", "measured speedup", ".3f"),
    number("predicted_speedup", "predicted speedup", ".3f"),
    number("off", "off by", "+.1%"),
    number("measured_ms", "measured ms", ".0f"),
    number("predicted_ms", "predicted ms", ".0f"),
]
GRID_COLUMNS = [
    plain("variant", "skip"),
    Column("fraction", lambda row: f"{row['fraction']:.0%}", right=False),
    Column("keep last", lambda row: "yes" if row["keep_last"] else "no", right=False),
    with_error("delta_nll", "NLL added"),
    with_spread("speedup_decode", "decode speedup", ".2f"),
    with_spread("speedup_prefill", "prefill speedup", ".2f"),
    number("kl", "KL"),
    number("top1_agreement", "top-1", ".2f"),
    number("perplexity", "perplexity", ".1f"),
    *WEIGHTS,
]
INSPECT_COLUMNS = [
    plain("sublayer"),
    number("parameters", "parameters", ","),
    number("share", "share", ".2%"),
    size("weight_bytes", "weights"),
    size("kv_bytes_per_token", "KV/token"),
]
SIMILARITY_COLUMNS = [number("layer", "layer", "d"), plain("kind"), with_error("cosine", "cosine", ".4f")]
FOOTPRINT_COLUMNS = [plain("model"), *WEIGHTS]
QUALITY_COLUMNS = [plain("model"), *QUALITY, number("sequences", "sequences", "d")]
TIMING_COLUMNS = [plain("model"), *SPEEDS, *WEIGHTS, size("peak_bytes", "peak memory")]
MARK = Column("worse", lambda row: "worse" if row["worse"] else "", right=False)
TASK_COLUMNS = [
    plain("task"),
    plain("metric"),
    with_error("delta", "difference", ".4f"),
    MARK,
    probability("p_value", "p"),
    with_error("value", "skipped", ".4f"),
    number("dense", "dense", ".4f"),
    number("num_fewshot", "shots", "d"),
    number("documents", "documents", "d"),
]
CHECK_COLUMNS = [
    plain("check"),
    with_error("delta", "difference"),
    MARK,
    probability("p_value", "p"),
    with_error("value", "skipped"),
    number("dense", "dense"),
]
CLAIM_COLUMNS = [plain("claim"), plain("verdict"), plain("here")]
FILE_COLUMNS = [plain("file"), size("bytes", "size")]
CRITERIA_COLUMNS = [plain("criterion"), plain("of"), plain("goes by")]

COMPARISON_COLUMNS = [
    plain("criterion"),
    plain("aim", "by"),
    plain("space", "among"),
    plain("count"),
    *QUALITY,
    number("speedup_decode", "decode speedup", ".2f"),
    number("seconds", "CPU s", ",.0f"),
    number("evaluations", "evaluations", ",d"),
    number("forwards", "forward passes", ",.1f"),
]


def choice_columns(found: ChosenPlan) -> list[Column]:
    return [
        plain("chosen"),
        *(QUALITY if found.held_out else ()),
        *(TIMES if found.times else ()),
        number("cost", "skipped", ".4f"),
        number("dense_cost", "dense", ".4f"),
        Column("in time", lambda row: "yes" if row["in_time"] else "no", right=False),
        number("seconds", "CPU s", ",.0f"),
        number("evaluations", "evaluations", ",d"),
        number("forwards", "forward passes", ",.1f"),
    ]
