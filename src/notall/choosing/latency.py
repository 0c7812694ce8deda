"""What each sublayer takes on this machine: measured once, kept, and added up to predict the time of any plan."""

from __future__ import annotations

import hashlib
import json
import statistics
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel

from ..measuring.speed import Spread, Timing, compare, machine, speedup
from ..models.cache import cache_folder, keep
from ..progress import Progress, silent
from ..records.plan import Plan
from ..records.strict_json import read_json
from ..running.skipping import skip
from ..structure.anatomy import Anatomy, Sublayer, text_config
from ..structure.locating import locate

DECODED = 32  # new tokens that are really decoded where more are asked about
MOST_CHANGED = 0.1  # how far the dense model's time may be from the kept one before all are measured anew
MOST_OFF = 0.05  # how far a prediction may be from what is measured


@dataclass(frozen=True)
class Workload:
    """A prompt of so many tokens, so many new ones, so many sequences at once."""

    prompt: int = 512
    new: int = 128
    batch: int = 1


@dataclass(frozen=True)
class Times:
    """Milliseconds of a workload: of the dense model, and of each sublayer by name (prefill and all new tokens)."""

    workload: Workload
    dense_ms: float
    sublayer_ms: Mapping[str, float]

    def predicted_ms(self, plan: Plan) -> float:
        """The dense model's time less what the skipped sublayers take, which were timed apart: they may sum to more."""
        return max(self.dense_ms - sum(self.sublayer_ms[name] for name in plan.names), self.dense_ms / 1000)


@dataclass(frozen=True)
class Prediction:
    """A plan's speedup as it was predicted and as it was measured, in turn with the dense model; `off` relates them."""

    predicted_ms: float
    measured_ms: float
    predicted_speedup: float
    measured_speedup: Spread

    @property
    def off(self) -> float:
        return self.predicted_speedup / self.measured_speedup.median - 1


def measure_times(
    model: PreTrainedModel,
    workload: Workload,
    *,
    rounds: int = 5,
    seed: int = 0,
    progress: Progress = silent,
) -> Times:
    """What each sublayer takes, by leaving out half of those that are alike, in turn with the dense model.

    Kept in the cache folder, by the model's shape, dtype, device, machine and versions. Kept times are used where the
    dense model still takes what it took, to a tenth, in one round; otherwise all are measured anew, with a warning.
    Of more than 32 new tokens 32 are decoded, behind the prompt, and counted as many times as needed.
    Raises `UsageError` for a workload that the model has too few positions for, and where the cache cannot be written.
    """
    anatomy = locate(model)
    about: dict[str, Any] = {
        "fingerprint": anatomy.fingerprint,
        "dtype": str(model.dtype),
        "machine": machine(model.device),
    }
    about |= {"attention": text_config(model)._attn_implementation, "rounds": rounds, **asdict(workload)}
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
    path = cache_folder() / "times" / f"{key}.json"
    held = _read(path, about, {part.name for part in anatomy.sublayers})
    if held and _holds(held, model, workload, seed):
        return Times(workload, held.dense_ms, held.sublayer_ms)
    times = _measure(model, workload, _alike(model), rounds, seed, progress)
    keep(path, _Kept(about=about, dense_ms=times.dense_ms, sublayer_ms=dict(times.sublayer_ms)).model_dump_json())
    return times


class _Kept(BaseModel):
    """Times as they are kept, in milliseconds of the whole workload, and what they are of."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    about: dict[str, Any]
    dense_ms: float = Field(gt=0)
    sublayer_ms: dict[str, float]

    def are(self, about: Mapping[str, Any], names: set[str]) -> bool:
        """Whether they are of this model and workload, and of each sublayer no more than the whole model takes."""
        plausible = all(abs(ms) <= self.dense_ms for ms in self.sublayer_ms.values())
        return plausible and self.about == about and self.sublayer_ms.keys() == names


def _read(path: Path, about: Mapping[str, Any], names: set[str]) -> _Kept | None:
    """The times in a file of the cache; None without one, and with a warning where it is damaged."""
    if not path.exists():
        return None
    try:
        kept = _Kept.model_validate(read_json(path.read_bytes()))
    except (OSError, ValueError):
        kept = None
    if kept is None or not kept.are(about, names):
        warnings.warn(f"the times kept in {path} are damaged: they are measured anew", stacklevel=3)
        return None
    return kept


def _holds(held: _Kept, model: PreTrainedModel, workload: Workload, seed: int) -> bool:
    """Whether the dense model takes now what it took; with a warning where it does not."""
    dense = _compare(model, {"dense": partial(skip, model, Plan())}, workload, 1, seed)["dense"]
    (now,) = _totals(dense, workload)
    if abs(now / held.dense_ms - 1) <= MOST_CHANGED:
        return True
    warnings.warn(
        f"the kept times no longer hold: the dense model took {held.dense_ms:.0f} ms then and takes {now:.0f} ms now; "
        "they are measured anew",
        stacklevel=3,
    )
    return False


def check_times(model: PreTrainedModel, plan: Plan, times: Times, *, rounds: int = 5, seed: int = 0) -> Prediction:
    """Time `plan` in turn with the dense model, and hold it against what the sublayers' times add up to."""
    variants = {name: partial(skip, model, one) for name, one in (("dense", Plan()), ("skipped", plan))}
    found = _compare(model, variants, times.workload, rounds, seed)
    dense, skipped = (_totals(found[name], times.workload) for name in ("dense", "skipped"))
    predicted = times.predicted_ms(plan)
    return Prediction(predicted, statistics.median(skipped), times.dense_ms / predicted, speedup(dense, skipped))


def _measure(
    model: PreTrainedModel,
    workload: Workload,
    groups: list[list[Sublayer]],
    rounds: int,
    seed: int,
    progress: Progress,
) -> Times:
    plans = {str(number): _half(group, locate(model)) for number, group in enumerate(groups)}
    variants: dict[str, Callable[[], Any]] = {"dense": partial(skip, model, Plan())}
    variants |= {name: partial(skip, model, plan) for name, plan in plans.items() if plan}
    found = _compare(
        model, variants, workload, rounds, seed, lambda done, total, _: progress(done, total, "timing the sublayers")
    )
    dense = _totals(found["dense"], workload)
    each: dict[str, float] = {}
    for number, group in enumerate(groups):
        plan = plans[str(number)]
        saved = 0.0
        if plan:
            without = _totals(found[str(number)], workload)
            saved = statistics.median(a - b for a, b in zip(dense, without)) / len(plan)
        each |= {part.name: saved for part in group}
    return Times(workload, statistics.median(dense), each)


def _alike(model: PreTrainedModel) -> list[list[Sublayer]]:
    """The sublayers in groups of the same kind, size and window, which take the same time."""
    groups: dict[tuple[Any, ...], list[Sublayer]] = {}
    for part in locate(model).sublayers:
        sizes = part.parameters, part.kv_bytes_per_token, part.state_bytes, bool(part.lends)
        groups.setdefault((part.kind, part.mixer, *sizes), []).append(part)
    return list(groups.values())


def _half(group: list[Sublayer], anatomy: Anatomy) -> Plan:
    """The plan that skips every second one of a group; the only attention that counts tokens stays."""
    chosen = [part.index for part in group[::2]]
    if group[0].kind == "mlp":
        return Plan(mlp=chosen)
    return Plan(chosen[1:] if anatomy.counting.issubset(chosen) else chosen)


def _compare(
    model: PreTrainedModel,
    variants: Mapping[str, Callable[[], Any]],
    workload: Workload,
    rounds: int,
    seed: int,
    progress: Progress = silent,
) -> dict[str, Timing]:
    return compare(
        model,
        variants,
        prompt_tokens=workload.prompt,
        new_tokens=min(workload.new, DECODED),
        batch_size=workload.batch,
        rounds=rounds,
        seed=seed,
        progress=progress,
    )


def _totals(timing: Timing, workload: Workload) -> list[float]:
    """Milliseconds of the whole workload, a round each."""
    pairs = zip(timing.prefill_samples_ms, timing.decode_samples_ms)
    return [prefill + workload.new * decode for prefill, decode in pairs]
