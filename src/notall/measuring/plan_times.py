"""Time a plan: the dense model and the skipped one in turn, in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..progress import Progress, silent
from ..records.bench import BenchRecord
from ..records.columns import Row
from ..records.ledger import Ledger, working_in
from ..records.plan import Plan
from ..records.provenance import Provenance
from ..running.footprint import footprint
from ..running.skipping import skip
from .speed import Spread, Timing, check_timing, compare, speedup


@dataclass(frozen=True)
class Timed:
    """How a plan is timed: `rounds` of a prompt and new tokens, dense and skipped in turn."""

    prompt_tokens: int = 128
    new_tokens: int = 16
    batch_size: int = 1
    rounds: int = 5

    def check(self, model: PreTrainedModel) -> None:
        """Raise `UsageError` as `check_timing` does."""
        check_timing(model, **asdict(self))


TIMED = Timed()


def time_plan(
    model: PreTrainedModel, plan: Plan, timed: Timed = TIMED, *, seed: int = 0, progress: Progress = silent
) -> dict[str, Row]:
    """Figures of the dense model and, unless the plan is empty, of the skipped model, by those names.

    Times are medians over rounds with their quartiles (`_low`, `_high`); a speedup is the median of the rounds' own
    ratios to dense. `peak_bytes` is CUDA memory, None elsewhere. Raises as `skip` and `compare` do.
    """
    plans = {"dense": Plan(), **({"skipped": plan} if plan else {})}
    variants = {name: partial(skip, model, one) for name, one in plans.items()}
    timings = compare(model, variants, **asdict(timed), seed=seed, progress=progress)
    dense = timings["dense"]
    return {name: timing_fields(model, plans[name], dense, timing) for name, timing in timings.items()}


def timing_fields(model: PreTrainedModel, plan: Plan, dense: Timing, timing: Timing) -> Row:
    """What a record says of one plan's times beside the dense model's of the same rounds, and of its memory."""
    return {
        **_with_spread("prefill_ms", timing.prefill_ms),
        **_with_spread("decode_ms_per_token", timing.decode_ms_per_token),
        **_with_spread("speedup_prefill", speedup(dense.prefill_samples_ms, timing.prefill_samples_ms)),
        **_with_spread("speedup_decode", speedup(dense.decode_samples_ms, timing.decode_samples_ms)),
        "peak_bytes": timing.peak_bytes,
        **asdict(footprint(model, plan)),
    }


def bench(
    model: PreTrainedModel,
    plan: Plan,
    timed: Timed,
    about: Provenance | Mapping[str, Any],
    *,
    out: Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Sequence[BenchRecord]:
    """`time_plan` as records, kept in the folder `out` beside earlier ones, if given.

    Raises `UsageError` before anything is timed when the folder is in use, holds another command's results or cannot
    be written.
    """
    plans = {"dense": Plan(), "skipped": plan}
    source = Provenance.of(about, seed=seed)
    with working_in(out, "bench") if out else nullcontext():
        kept = Ledger(out, BenchRecord) if out else None
        found = time_plan(model, plan, timed, seed=seed, progress=progress)
        records = [
            BenchRecord(
                model=name,  # type: ignore[arg-type]
                plan=plans[name],
                beside=plan if name == "dense" and plan else None,
                **asdict(timed),
                **figures,
                provenance=source,
            )
            for name, figures in found.items()
        ]
        if kept is not None:
            kept.add(*records)
    return records


def _with_spread(name: str, spread: Spread) -> dict[str, float]:
    return {name: spread.median, f"{name}_low": spread.low, f"{name}_high": spread.high}
