"""Time a plan: the dense model and the skipped one in turn, in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..plan import Plan
from ..progress import Progress, silent
from ..records import ledger
from ..running.footprint import footprint
from ..running.skipping import skip
from .speed import Spread, Timing, compare, speedup

BENCH = "bench.jsonl"


@dataclass(frozen=True)
class Timed:
    """How a plan is timed: `rounds` of a prompt and new tokens, dense and skipped in turn."""

    prompt_tokens: int = 128
    new_tokens: int = 16
    batch_size: int = 1
    rounds: int = 5


TIMED = Timed()


def time_plan(
    model: PreTrainedModel,
    plan: Plan,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    batch_size: int = 1,
    rounds: int = 5,
    seed: int = 0,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """One row for the dense model and, unless the plan is empty, one for the skipped model.

    Times are medians over rounds with their quartiles (`_low`, `_high`); a speedup is the median of the rounds' own
    ratios to dense. `peak_bytes` is CUDA memory, None elsewhere. Raises as `skip` and `compare` do.
    """
    variants: dict[str, Callable[[], Any]] = {"dense": nullcontext}
    if plan:
        variants["skipped"] = lambda: skip(model, plan)
    timings = compare(
        model,
        variants,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        rounds=rounds,
        seed=seed,
        progress=progress,
    )
    plans = {"dense": Plan(), "skipped": plan}
    dense = timings["dense"]
    return [{"model": name} | timing_fields(model, plans[name], dense, timing) for name, timing in timings.items()]


def timing_fields(model: PreTrainedModel, plan: Plan, dense: Timing, timing: Timing) -> dict[str, Any]:
    """What a record says of one plan's times beside the dense model's of the same rounds, and of its memory."""
    return {
        **_with_spread("prefill_ms", timing.prefill_ms),
        **_with_spread("decode_ms_per_token", timing.decode_ms_per_token),
        **_with_spread("speedup_prefill", speedup(dense.prefill_samples_ms, timing.prefill_samples_ms)),
        **_with_spread("speedup_decode", speedup(dense.decode_samples_ms, timing.decode_samples_ms)),
        "peak_bytes": timing.peak_bytes,
        **asdict(footprint(model, plan)),
    }


def keep_times(out: Path, rows: Sequence[dict[str, Any]], plan: Plan, about: Mapping[str, Any]) -> None:
    """Append what `time_plan` answers for `plan` to `out/bench.jsonl`, each row with its plan and what `about` says.

    Raises `UsageError` when the folder is in use or cannot be written.
    """
    plans = {"dense": Plan(), "skipped": plan}
    with ledger.lock(out):
        ledger.append(out / BENCH, *({**row, "plan": plans[row["model"]].indices, **about} for row in rows))


def _with_spread(name: str, spread: Spread) -> dict[str, float]:
    return {name: spread.median, f"{name}_low": spread.low, f"{name}_high": spread.high}
