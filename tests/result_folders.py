"""Results folders as `notall sweep` leaves them, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from notall import results

LAYERS = 10
ABOUT = {
    "model": "tiny",
    "revision": "none",
    "device": "cpu",
    "dtype": "float32",
    "versions": {"torch": "2"},
    "text": "t",
}
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
            results.append(folder / f"{name}.jsonl", row)
    return folder


def write_nasty(folder: Path) -> Path:
    """A folder in which every text is hostile."""
    about = {**ABOUT, "model": NASTY, "text": NASTY, NASTY[:40]: NASTY}
    return write(
        folder,
        results=[row | {"provenance": about} for row in all_records()],
        similarity=[row | {"provenance": about} for row in similarity()],
        samples=samples(NASTY, NASTY),
        other=[{"name": NASTY, "value": 1.0, NASTY[:60]: json.dumps(NASTY)}, {"name": "=1+1", "value": None}],
    )
