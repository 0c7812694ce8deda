"""What each sublayer takes on this machine: measured once, kept, and added up to
predict the time of any plan.
"""

import math
import statistics
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from numbers import Real
from pathlib import Path

from pydantic import BaseModel, Field
from transformers import PreTrainedModel

from ..cache import cache_folder, write_cached
from ..digests import digest_of_json
from ..errors import UsageError, expect
from ..files import contents
from ..integrity import sealed, unsealed
from ..measuring.speed import compare_speeds, devices_of, machine, speedup
from ..options import Workload
from ..plan import Phase, Plan, bound_to_prompt
from ..progress import Progress, Stages, silent
from ..results.facts import SpeedCheck
from ..running.skipping import skip
from ..strict_json import Settings, read_json
from ..structure.locating import locate
from ..structure.model_structure import ModelStructure, Sublayer, text_config
from .budget import Budget
from .space import Space

DECODED = 16  # new tokens that are really decoded where more are asked about
MOST_ERROR = 0.02  # of the speedup that is asked for: a noisy machine excuses no more
MOST_TIMES = 4  # as many rounds, where a machine is noisy
# times what one round of the emptiest model shows: more is refused before each sublayer
# is timed
FAR = 1.5
# how far the original model's time may be from the kept one before all are measured
# anew
MOST_CHANGED = 0.1


@dataclass(frozen=True)
class SublayerTimes:
    """Milliseconds of a workload: of the original model, and of each sublayer by name
    (prefill and all new tokens).

    With the `phase` prefill they are of the prompt alone, up to the first new token;
    those of an attention are what it takes beyond its keys and values, which are
    written all the same.
    """

    workload: Workload
    dense_ms: float
    sublayer_ms: Mapping[str, float]
    phase: Phase = "all"

    def predicted_ms(self, plan: Plan) -> float:
        """The original's time less what the skipped sublayers take, which were timed
        apart: they may sum to more.
        """
        skipped = plan.prefill.names if self.phase == "prefill" else plan.names
        return max(
            self.dense_ms - sum(self.sublayer_ms[name] for name in skipped),
            self.dense_ms / 1000,
        )


def measure_times(
    model: PreTrainedModel,
    workload: Workload,
    *,
    phase: Phase = "all",
    wanted: tuple[Space, float] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> SublayerTimes:
    """What each sublayer takes, by leaving out half of those that are alike,
    interleaved with the original model.

    With the `phase` prefill they are left out of the prompt alone, and the time to the
    first new token counts.

    Kept in the cache folder, by the model's shape, dtype, device, machine and versions,
    for as long as the original takes what it took, to a tenth. Of more than 16 new
    tokens 16 are decoded, and counted as many times as needed. Raises `UsageError` for
    a workload that the model has too few positions for, where the cache cannot be
    written, and at once where a speedup is `wanted` that skipping all of a space, in
    one round, is far from.
    """
    structure = locate(model)
    about: dict[str, object] = {
        "fingerprint": structure.fingerprint,
        "dtype": str(model.dtype),
        **asdict(workload),
    }
    if phase == "prefill":
        about |= {"phase": phase, "generation_tokens": 0}
    about["machine"] = machine(*devices_of(model))
    about["attention"] = text_config(model)._attn_implementation
    path = cache_folder("times") / f"{digest_of_json(about)[:24]}.json"
    names = {part.name for part in structure.sublayers}
    known = _read(path, about, workload, names, phase) if path.exists() else None
    if known:
        (now,) = _compare(
            model, {"dense": Plan()}, replace(workload, rounds=1), seed, phase
        )["dense"]
        if abs(now / known.dense_ms - 1) <= MOST_CHANGED:
            return known
        then = (
            f"the original model took {known.dense_ms:.0f} ms then and takes {now:.0f}"
            " ms now"
        )
        warnings.warn(
            f"the kept times no longer hold: {then}; they are measured anew",
            stacklevel=2,
        )
    if wanted:
        _refuse_far(model, workload, *wanted, seed)
    groups = {str(number): group for number, group in enumerate(_alike(model))}
    halves = {
        name: plan
        for name, group in groups.items()
        if (plan := _half(group, structure, phase))
    }
    plans = {"dense": Plan(), **halves}

    def telling(done: float, total: float, _: str) -> None:
        progress(done, total, "timing the sublayers")

    took = _compare(model, plans, workload, seed, phase, telling)
    each: dict[str, float] = {}
    for name, group in groups.items():
        differences = [
            dense - without
            for dense, without in zip(took["dense"], took.get(name, took["dense"]))
        ]
        saved = statistics.median(differences) / len(
            _names(halves[name]) if name in halves else group
        )
        each |= {part.name: saved for part in group}
    times = SublayerTimes(workload, statistics.median(took["dense"]), each, phase)
    stored = _Stored(about=about, dense_ms=times.dense_ms, sublayer_ms=each)
    write_cached(path, sealed(stored.model_dump_json().encode()))
    return times


def _refuse_far(
    model: PreTrainedModel, workload: Workload, space: Space, faster: float, seed: int
) -> None:
    kept = min(
        locate(model).counting, default=None
    )  # of attentions that count tokens one stays
    plan = space.plan(name for name in space.names if name != f"attn.{kept}")
    took = _compare(
        model,
        {"dense": Plan(), "emptiest": plan},
        replace(workload, rounds=1),
        seed,
        space.phase,
    )
    most = took["dense"][0] / took["emptiest"][0]
    if faster > FAR * most:
        problem = (
            f"without all that may be skipped the model is {most:.1f} times as fast"
        )
        raise UsageError(
            f"a speedup of {faster:g} is far out of reach: {problem}; ask for less"
        )


class _Stored(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """SublayerTimes as they are kept, and what they are of."""

    about: Settings
    dense_ms: float = Field(gt=0)
    sublayer_ms: dict[str, float]


def _read(
    path: Path,
    about: Mapping[str, object],
    workload: Workload,
    names: set[str],
    phase: Phase,
) -> SublayerTimes | None:
    """The times in a file of the cache; None with a warning where they are damaged, or
    of another model or workload.
    """
    with suppress(OSError, ValueError):
        stored = _Stored.model_validate(read_json(unsealed(contents(path)) or b""))
        plausible = all(
            abs(ms) <= stored.dense_ms for ms in stored.sublayer_ms.values()
        )
        if plausible and stored.about == about and stored.sublayer_ms.keys() == names:
            return SublayerTimes(workload, stored.dense_ms, stored.sublayer_ms, phase)
    warnings.warn(
        f"the times kept in {path} are damaged: they are measured anew", stacklevel=3
    )
    return None


def check_times(
    model: PreTrainedModel,
    plan: Plan,
    times: SublayerTimes,
    *,
    rounds: int = 5,
    error: float = math.inf,
    progress: Progress = silent,
) -> SpeedCheck:
    """Time `plan` interleaved with the original model, and hold it against what the
    sublayers' times add up to.

    As many `rounds` follow, up to three times, while the speedup's standard error is
    more than `error`.
    """
    dense, skipped = list[float](), list[float]()
    plans, stages = {"dense": Plan(), "skipped": plan}, Stages(progress, MOST_TIMES)
    for _ in range(MOST_TIMES):
        took = _compare(
            model,
            plans,
            replace(times.workload, rounds=rounds),
            0,
            times.phase,
            stages.stage(1),
        )
        dense, skipped = dense + took["dense"], skipped + took["skipped"]
        if (measured := speedup(dense, skipped)).error <= error:
            break
    ms, took_ms = times.predicted_ms(plan), statistics.median(skipped)
    return SpeedCheck(
        predicted_ms=ms,
        predicted_speedup=times.dense_ms / ms,
        measured_ms=took_ms,
        measured_speedup=measured,
    )


def _likeness(part: Sublayer) -> Hashable:
    """Kind, size and window: sublayers that have these in common take the same time."""
    sizes = (
        part.parameters,
        part.kv_bytes_per_token,
        part.state_bytes,
        bool(part.read_by),
    )
    return part.kind, part.mixer, *sizes


def saved_alike(structure: ModelStructure, skipped: Iterable[str]) -> Hashable:
    """What tells sets of skipped sublayers apart by the time that they save: how many
    there are of each likeness.
    """
    gone = set(skipped)
    return frozenset(
        Counter(
            _likeness(part) for part in structure.sublayers if part.name in gone
        ).items()
    )


def _alike(model: PreTrainedModel) -> list[list[Sublayer]]:
    """The sublayers in groups, which take the same time each."""
    groups: dict[Hashable, list[Sublayer]] = {}
    for part in locate(model).sublayers:
        groups.setdefault(_likeness(part), []).append(part)
    return list(groups.values())


def _half(
    group: list[Sublayer], structure: ModelStructure, phase: Phase = "all"
) -> Plan:
    """The plan that skips every second one of a group; the only attention that counts
    tokens stays.
    """
    kind, chosen = group[0].kind, [part.index for part in group[::2]]
    if kind == "attention" and structure.counting.issubset(chosen):
        chosen = chosen[1:]
    if phase == "all":
        return Plan(**{kind: chosen})
    bound = any(bound_to_prompt(structure, part) for part in group)
    return Plan() if bound else Plan(prefill={kind: chosen})


def _names(plan: Plan) -> tuple[str, ...]:
    return plan.names + plan.prefill.names


def _compare(
    model: PreTrainedModel,
    plans: Mapping[str, Plan],
    workload: Workload,
    seed: int,
    phase: Phase,
    progress: Progress = silent,
) -> dict[str, list[float]]:
    """Milliseconds of the whole workload, or of its prompt, a round each, without what
    each of `plans` skips.
    """
    tokens = 0 if phase == "prefill" else workload.generation_tokens
    variants = {name: partial(skip, model, plan) for name, plan in plans.items()}
    decoded = replace(workload, generation_tokens=min(tokens, DECODED) or 1)
    timings = compare_speeds(model, variants, decoded, seed=seed, progress=progress)
    samples = {
        name: zip(one.prefill_samples_ms, one.decode_samples_ms)
        for name, one in timings.items()
    }
    return {
        name: [prefill + tokens * decode for prefill, decode in pairs]
        for name, pairs in samples.items()
    }


@dataclass(frozen=True, kw_only=True)
class SpeedBudget(Budget):
    """Milliseconds to save of a workload, by `times`, so that it runs `faster` times as
    fast.
    """

    faster: float
    space: Space
    times: SublayerTimes

    def reached(self, check: SpeedCheck) -> bool:
        """Whether what was measured is what was asked for, within its standard error,
        which may be `MOST_ERROR`.

        A larger one counts against it, so that a noisy machine meets nothing by chance.
        """
        measured, most = check.measured_speedup, MOST_ERROR * self.faster
        return (
            measured.median + min(measured.error, 3 * most - 2 * measured.error)
            >= self.faster
        )

    def corrected(self, check: SpeedCheck) -> "SpeedBudget | None":
        """By times that tell what was measured: what sublayers save is scaled. None
        where that can't be enough.
        """
        predicted, measured = (
            1 - 1 / ratio
            for ratio in (check.predicted_speedup, check.measured_speedup.median)
        )
        if not (predicted > 0 and measured > 0):
            return None
        scaled = {
            name: ms * measured / predicted
            for name, ms in self.times.sublayer_ms.items()
        }
        with suppress(UsageError):
            return by_speedup(
                self.space, replace(self.times, sublayer_ms=scaled), self.faster
            )
        return None


def by_speedup(space: Space, times: SublayerTimes, faster: float) -> SpeedBudget:
    """A budget: the workload of `times` must run `faster` times as fast. Raises
    `UsageError` where it cannot.
    """
    check_faster(faster)
    if space.phase != times.phase:
        raise UsageError(
            f"these times are of the phase {times.phase}: measure_times(...,"
            f" phase={space.phase!r})"
        )
    saves = {name: max(times.sublayer_ms[name], 0.0) for name in space.names}
    left = times.dense_ms - sum(saves.values())
    most = times.dense_ms / left if left > 0 else math.inf
    if faster > most:
        raise UsageError(
            f"a speedup of {faster:g} is out of reach: ask for at most {most:.2f},"
            " without all of it"
        )
    w = times.workload
    what = f"at prompt {w.prompt_tokens}, {w.generation_tokens} new"
    if space.phase == "prefill":
        what = f"to the first token at prompt {w.prompt_tokens}"
    described = f"{faster:g}x {what}, batch {w.concurrency}"
    target = times.dense_ms * (1 - 1 / faster)
    return SpeedBudget(
        saves, target, described, faster=faster, space=space, times=times
    )


def check_faster(faster: float) -> None:
    """Raise `UsageError` for what is no speedup."""
    expect(faster, Real, "how many times as fast, a number")
    if not 1 <= faster < math.inf:
        raise UsageError(
            f"a speedup of {faster} is none: give 1.3 for a model that is 1.3 times as"
            " fast"
        )
