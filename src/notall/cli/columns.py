"""The columns of each table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..reporting.console import Column, number, plain, probability, size, with_error, with_spread

if TYPE_CHECKING:
    from ..choosing.choice import ChosenPlan

QUALITY: list[Column] = [
    with_error("nll", "NLL"),
    with_error("delta_nll", "ΔNLL"),
    number("perplexity", "perplexity", ".1f"),
    with_error("kl", "KL"),
    with_error("top1_agreement", "top-1 agreement", ".2f"),
]
SPEEDS: list[Column] = [
    with_spread("prefill_ms", "prefill ms"),
    with_spread("decode_ms_per_token", "decode ms/token"),
    with_spread("speedup_prefill", "prefill speedup", ".2f"),
    with_spread("speedup_decode", "decode speedup", ".2f"),
]
WEIGHTS: list[Column] = [
    number("params", "parameters", ","),
    size("weight_bytes", "weights"),
    size("kv_bytes_per_token", "KV/token"),
]
TIMES: list[Column] = [
    number("predicted_ms", "predicted ms", ".0f"),
    number("measured_ms", "measured ms", ".0f"),
    number("predicted_speedup", "predicted speedup", ".3f"),
    with_spread("speedup", "measured speedup", ".3f"),
    number("off", "off by", "+.1%"),
]
GRID_COLUMNS = [
    plain("variant", "skip"),
    number("fraction", "fraction", ".0%"),
    Column("keep last", lambda row: "yes" if row["keep_last"] else "no", right=False),
    with_error("delta_nll", "ΔNLL"),
    number("perplexity", "perplexity", ".1f"),
    number("kl", "KL"),
    number("top1_agreement", "top-1", ".2f"),
    with_spread("speedup_prefill", "prefill speedup", ".2f"),
    with_spread("speedup_decode", "decode speedup", ".2f"),
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
MARK = Column("", lambda row: "worse" if row["worse"] else "", right=False)
TASK_COLUMNS = [
    plain("task"),
    plain("metric"),
    number("num_fewshot", "shots", "d"),
    number("documents", "documents", "d"),
    number("dense", "dense", ".4f"),
    with_error("value", "skipped", ".4f"),
    with_error("delta", "difference", ".4f"),
    probability("p_value", "p"),
    MARK,
]
CHECK_COLUMNS = [
    plain("check"),
    number("dense", "dense"),
    with_error("value", "skipped"),
    with_error("delta", "difference"),
    probability("p_value", "p"),
    MARK,
]
CLAIM_COLUMNS = [plain("claim"), plain("here"), plain("verdict")]
FILE_COLUMNS = [plain("file"), size("bytes", "size")]


COMPARISON_COLUMNS = [
    plain("space", "among"),
    number("count", "count", "d"),
    plain("criterion"),
    plain("aim", "by"),
    *QUALITY,
    number("evaluations", "evaluations", ",d"),
    number("forwards", "forward passes", ",.1f"),
    number("seconds", "CPU s", ",.0f"),
    number("speedup_decode", "decode speedup", ".2f"),
]


def choice_columns(found: ChosenPlan) -> list[Column]:
    return [
        plain("chosen"),
        number("dense_cost", "dense", ".4f"),
        number("cost", "skipped", ".4f"),
        number("evaluations", "evaluations", ",d"),
        number("forwards", "forward passes", ",.1f"),
        number("seconds", "CPU s", ",.0f"),
        Column("in time", lambda row: "yes" if row["in_time"] else "no", right=False),
        *(QUALITY if found.held_out else ()),
        *(TIMES if found.times else ()),
    ]
