"""The columns of each table."""

from __future__ import annotations

from ..console import Column, number, plain, size, with_error, with_spread

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
    number("p_value", "p", ".3f"),
    MARK,
]
CHECK_COLUMNS = [
    plain("check"),
    number("dense", "dense"),
    with_error("value", "skipped"),
    with_error("delta", "difference"),
    number("p_value", "p", ".3f"),
    MARK,
]
CLAIM_COLUMNS = [plain("claim"), plain("here"), plain("verdict")]
FILE_COLUMNS = [plain("file"), size("bytes", "size")]
