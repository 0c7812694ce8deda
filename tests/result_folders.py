"""Results folders as `notall sweep` leaves them, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from api import records_lines as lines

LAYERS = 10
ABOUT = {
    "model": "tiny",
    "revision": "none",
    "device": "cpu",
    "dtype": "float32",
    "versions": {"torch": "2"},
    "text": "t",
}
QUALITY = (
    *("nll", "nll_se", "delta_nll", "delta_nll_se", "perplexity"),
    *("kl", "kl_se", "top1_agreement", "top1_agreement_se", "sequences"),
)
SPENT = {"evaluations": 1, "executions": 2.0, "one_by_one": 5.0, "seconds": 0.1}
NASTY = (
    "<script>window.pwned = 1</script></script><img src=x onerror='window.pwned = 1'> \"quoted' {{ 7 * 7 }} `${1}` "
    "\u202e\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 " + "x" * 10_000
)


def record(variant: str, fraction: float, keep_last: bool, lost: float | None, **changes: Any) -> dict[str, Any]:
    count = round(fraction * LAYERS)
    last = LAYERS - keep_last
    window = list(range(last - count, last))
    speedup = 1 + fraction * {"dense": 0, "attention": 0.5, "mlp": 0.8, "block": 1.2}[variant]
    spread = {"_low": 0.95, "": 1.0, "_high": 1.1}
    return {
        "variant": variant,
        "fraction": fraction,
        "keep_last": keep_last,
        "plan": {"attention": window * (variant != "mlp"), "mlp": window * (variant != "attention")},
        "nll": None if lost is None else 2.5 + lost,
        "nll_se": 0.1,
        "delta_nll": lost,
        "delta_nll_se": None if lost is None else lost / 10,
        "perplexity": 12.2,
        "kl": lost,
        "kl_se": 0.01,
        "top1_agreement": 0.5,
        "top1_agreement_se": 0.01,
        "sequences": 8,
        **{f"prefill_ms{end}": 100 / speedup * by for end, by in spread.items()},
        **{f"decode_ms_per_token{end}": 50 / speedup * by for end, by in spread.items()},
        **{f"speedup_prefill{end}": speedup * by for end, by in spread.items()},
        **{f"speedup_decode{end}": speedup * by for end, by in spread.items()},
        "peak_bytes": None,
        "params": 1_000_000 - count * 10_000,
        "weight_bytes": 4_000_000 - count * 40_000,
        "kv_bytes_per_token": 1000 - (variant in ("attention", "block")) * count * 100,
        "provenance": ABOUT,
    } | changes


def all_records() -> list[dict[str, Any]]:
    rows = [record("dense", 0.0, False, 0.0)]
    for variant, lost in (("attention", 0.2), ("mlp", 1.1), ("block", 3.0)):
        for fraction in (0.1, 0.25, 0.33):
            rows += [record(variant, fraction, keep, lost * fraction * (8 - 3 * keep)) for keep in (False, True)]
    return rows


def similarity() -> list[dict[str, Any]]:
    return [
        {"layer": layer, "kind": kind, "cosine": 0.5 + 0.04 * layer, "cosine_se": 0.01}
        for layer in range(LAYERS)
        for kind in ("block", "attention", "mlp")
    ]


def samples(prompt: str = "One, two,", said: str = "three.") -> list[dict[str, Any]]:
    keys = ("variant", "fraction", "keep_last", "plan", "provenance")
    return [
        {key: row[key] for key in keys} | {"samples": [{"prompt": prompt, "said": said}]} for row in all_records()[:2]
    ]


def alone() -> list[dict[str, Any]]:
    """What leaving out each sublayer costs, as a sweep writes it."""
    return [
        {"kind": kind, "layer": i, "delta_nll": 0.1 * i, "delta_nll_se": 0.01, "sequences": 2, "provenance": ABOUT}
        for kind in ("attention", "mlp")
        for i in range(LAYERS)
    ]


def evaluations(objective: str = "kl", layers: int = LAYERS, batches: Any = "all") -> list[dict[str, Any]]:
    """What a search or a comparison evaluated: the dense model, each attention alone, and two together."""
    sets = [[], *([f"attn.{i}"] for i in range(layers)), ["attn.1", "attn.2"]]
    costs = [1.0, *(1 + 0.1 * i for i in range(layers)), 9.0]
    lines = [{"skipped": names, "batches": batches, "cost": cost} | SPENT for names, cost in zip(sets, costs)]
    return [{"settings": {"objective": objective}}, *lines]


def compared(criterion: str, space: str, count: int, lost: float | None, **changes: Any) -> dict[str, Any]:
    window = list(range(LAYERS - count, LAYERS))
    measured = record("attention", 0.1, False, lost)
    return {
        "criterion": criterion,
        "aim": "kl",
        "space": space,
        "count": count,
        "skipped": " ".join(f"attn.{index}" for index in window),
        "order": [[f"attn.{index}"] for index in reversed(window)],
        "calibration_delta": None,
        "calibration_tokens": 512,
        "evaluations": 10 * count,
        "executions": 20.0 * count,
        "one_by_one": 80.0 * count,
        "forwards": 2.5 * count,
        "forwards_in_full": 9.5 * count,
        "seconds": 1.5,
        "plan": {"attention": window, "mlp": []},
        **{name: measured[name] for name in QUALITY},
        **{name: measured[name] for name in ("params", "weight_bytes", "kv_bytes_per_token")},
        "tasks": {
            "arc_easy acc": {"value": 0.5 - 0.01 * count, "delta": -0.01 * count, "delta_stderr": 0.02, "p_value": 0.5}
        },
        **{name: value for name, value in measured.items() if name.startswith(("prefill", "decode", "speed"))},
        "provenance": ABOUT | {"fingerprint": f"llama-{LAYERS + 2}x64-00000000"},
    } | changes


def all_compared() -> list[dict[str, Any]]:
    """Two spaces, three ways to choose, two counts."""
    ways = (("search", 0.1), ("cosine", 0.3), ("deepest", 0.9))
    return [
        compared(way, space, count, lost * count)
        for space, counts in (("attention", (2, 4)), ("portable", (2, 6)))
        for way, lost in ways
        for count in counts
    ]


def write_comparison(folder: Path, records: list[dict[str, Any]] | None = None) -> Path:
    raw = {"settings": {"raw": True}}
    write(folder, results=records or all_compared(), choices=[raw], held_out=[raw], times=[raw | {"left": "raw"}])
    return write(
        folder, **{"evaluations/leave-one-out-kl": evaluations(), "evaluations/search-kl": evaluations("kl", 3, 2)}
    )


def chosen(count: int, **changes: Any) -> dict[str, Any]:
    names = ("criterion", "aim", "space", "count", "skipped", "tasks", "params", "weight_bytes", "kv_bytes_per_token")
    names += ("calibration_tokens", "forwards_in_full", "calibration_delta")
    row = {name: value for name, value in compared("search", "attention", count, 0.2).items() if name not in names}
    row = {name: value for name, value in row.items() if not name.startswith(("prefill", "decode", "speed"))}
    found = {"chosen": f"search by kl: {count} attention", "dense_cost": 0.0, "cost": 0.25, "in_time": True}
    times = {"predicted_ms": 80.0, "measured_ms": 78.0, "predicted_speedup": 1.2, "off": -0.04}
    times |= {"speedup": 1.25, "speedup_low": 1.2, "speedup_high": 1.3}
    return row | found | times | changes


def measured(text: str, model: str, lost: float | None, **changes: Any) -> dict[str, Any]:
    """What a plan of three attentions loses on a text, in one of its states."""
    found = record("attention", 0.33, False, lost)
    about = {"what": {"model": "tiny", "fingerprint": f"llama-{LAYERS + 2}x64-00000000"}, "where": {"device": "cpu"}}
    kept = {name: found[name] for name in (*QUALITY, "plan")}
    return {"record": "measured", "text": text, "model": model, **kept, "provenance": about} | changes


def headed(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"record": "header", "provenance": {"what": {"model": "tiny"}, "where": {}}}, *rows]


def refits() -> list[dict[str, Any]]:
    """Of what stands before a gap and behind it; one was left alone."""
    left = {"attn.5": 0.9, "mlp.5": 0.7, "mlp.6": 0.8, "attn.10": 1.0, "mlp.10": 0.95}
    about = {"record": "refit", "seconds": 0.1, "why": ""}
    return headed(
        *(
            about | {"sublayers": [name], "left": part, "ridge": None if part == 1 else 0.3}
            for name, part in left.items()
        )
    )


def looks() -> list[dict[str, Any]]:
    """How far a healing was."""
    far = ((0, 0.4), (512, 0.3), (1024, 0.25))
    return headed(*({"record": "healing", "tokens": tokens, "held_out_kl": kl, "seconds": 1.0} for tokens, kl in far))


def all_measured(before: str = "skipped", after: str = "repaired") -> list[dict[str, Any]]:
    """On two texts."""
    return [
        measured(text, model, lost * share)
        for text, lost in (("prose, other windows", 0.4), ("book.txt", 0.8))
        for model, share in ((before, 1), (after, 0.25))
    ]


def benched(variant: str, model: str, **changes: Any) -> dict[str, Any]:
    times = ("prefill", "decode", "speed", "params", "weight", "kv_", "plan", "peak", "provenance")
    row = {
        name: value
        for name, value in record(variant, 0.33 * (variant != "dense"), False, 0.0).items()
        if name.startswith(times)
    }
    return {"model": model, **row, "prompt_tokens": 128, "new_tokens": 32, "batch_size": 1, "rounds": 5} | changes


def all_benched() -> list[dict[str, Any]]:
    """Two models' benches, one after the other."""
    dense = benched("dense", "dense")
    larger = dense | {"weight_bytes": 8_000_000, "batch_size": 4}
    return [
        dense,
        benched("attention", "skipped"),
        larger,
        benched("block", "skipped", batch_size=4),
    ]


def benchmarks() -> list[dict[str, Any]]:
    """Two benchmarks of the paper's grid; the dense model answers one document more of both."""
    about = {"num_fewshot": 0, "documents": 40, "value_se": 0.1, "delta_se": 0.05, "p_value": 0.04}
    about |= {"higher_is_better": True, "values": [0.5], "metric": "acc,none"}
    return [
        _configured(row) | about | {"task": task, "value": 0.5, "delta": -0.2 * (row["variant"] != "dense")}
        for task in ("arc", "boolq")
        for row in all_records()
    ]


def times() -> list[dict[str, Any]]:
    """At two prompt lengths; at the shorter one every plan is three times as fast as at the longer."""
    sizes = ("params", "weight_bytes", "kv_bytes_per_token", "peak_bytes")
    return [
        _configured(row)
        | {
            name: value
            for name, value in row.items()
            if name in sizes or name.startswith(("prefill", "decode", "spee"))
        }
        | {f"speedup_decode{end}": row[f"speedup_decode{end}"] * 3 ** (prompt == 128) for end in ("_low", "", "_high")}
        | {"prompt_tokens": prompt, "batch_size": 1, "asked_batch_size": 1}
        for prompt in (512, 128)
        for row in all_records()
    ]


def battery() -> list[dict[str, Any]]:
    """At two depths of long texts, and a passkey."""
    about = {"part": "p", "value_se": 0.1, "delta_se": 0.1, "p_value": 0.5, "better": "lower", "worse": False}
    return [
        _configured(row) | about | {"check": check, "value": 3.0, "delta": row["delta_nll"] + more}
        for row in all_records()[1:]
        for check, more in (("NLL at 0 to 63", 0.1), ("NLL at 64 to 127", -0.1), ("passkey at 256", 9.0))
    ]


def _configured(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("variant", "fraction", "keep_last", "plan", "provenance")}


CLAIMS = (
    {"claim": "one", "verdict": "holds", "here": "1.00× [1.00, 1.00]"},
    {"claim": "a | b", "verdict": "does not hold", "here": "+0.1 ± 0.2"},
    {"claim": "three", "verdict": "within error", "here": ""},
    {"claim": "four", "verdict": "within error", "here": "+0.1"},
)


def write_paper(folder: Path, *, battery: bool = False) -> Path:
    """Records of the benchmarks, times and claims, as `notall paper` leaves them."""
    claims = [{"record": "claim", "provenance": {"what": ABOUT}} | claim for claim in CLAIMS]
    files = {"benchmarks": benchmarks(), "times": times()} | ({"battery": _battery()} if battery else {})
    return write(folder, **files, claims=claims)


_battery = battery


def write(folder: Path, **files: list[dict[str, Any]]) -> Path:
    """A folder with the files that are named, or with all that a sweep writes."""
    files = files or {
        "results": all_records(),
        "similarity": [row | {"provenance": ABOUT} for row in similarity()],
        "samples": samples(),
        "scores": [{"batch": 0, "scores": [], "provenance": ABOUT}],
    }
    for name, rows in files.items():
        for row in rows:
            lines.append(folder / f"{name}.jsonl", row)
    return folder


def nasty_about() -> dict[str, Any]:
    return {**ABOUT, "model": NASTY, "text": NASTY, NASTY[:40]: NASTY}


def write_nasty_comparison(folder: Path) -> Path:
    """A comparison in which every name is hostile."""
    task = {"value": 0.5, "delta": 0.1, "delta_stderr": 0.1}
    named = {"aim": NASTY, "evaluations": 9, "provenance": nasty_about(), "tasks": {NASTY: task}}
    rows = [compared(NASTY, NASTY, count, 0.1 * count, **named) for count in (2, 4)]
    write(folder, **{"evaluations/leave-one-out-x": evaluations(NASTY)})
    return write_comparison(folder, [*rows, compared("cosine", "attention", 2, 0.3)])


def write_nasty(folder: Path) -> Path:
    """A folder in which every text is hostile."""
    about = nasty_about()
    return write(
        folder,
        results=[row | {"provenance": about} for row in all_records()],
        similarity=[row | {"provenance": about} for row in similarity()],
        samples=samples(NASTY, NASTY),
        other=[{"name": NASTY, "value": 1.0, NASTY[:60]: json.dumps(NASTY)}, {"name": "=1+1", "value": None}],
    )
