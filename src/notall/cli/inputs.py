"""What commands make of their options: models, token batches, plans, provenance."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UsageError, shortened
from ..reporting.progress_bars import progress_bar, working
from .options import SkippedKind

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..choosing.budget import Budget, Resource
    from ..choosing.latency import Workload
    from ..choosing.space import Space
    from ..evaluation.ray_workers import Workers
    from ..records.plan import Plan
    from ..records.provenance import Provenance


MANIFEST = "notall.json"  # of an export


@dataclass(frozen=True)
class Loading:
    """What the options say of how to load a model: the arguments of `notall.load`."""

    spec: str
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False


def load_model(loading: Loading) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer."""
    from ..running.opening import load

    with working(f"loading {loading.spec}"):
        return load(**asdict(loading))


def empty_model(spec: str, dtype: str | None, revision: str | None, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a config, without weights, in a dtype, or else in the checkpoint's own, quantised as it is there.

    A GGUF file's is what it is exported in.
    """
    from ..exporters import UNPACKED
    from ..exporters.weights import stored_sizes
    from ..models.folders import named_weights
    from ..models.loading import named_dtype
    from ..models.names import named_gguf
    from ..models.quantisation import quantisation_of
    from ..running.opening import load_empty
    from ..structure.weights import count_as_stored

    dtype = dtype or (UNPACKED if named_gguf(spec) else None)
    given = named_dtype(dtype) if dtype else None
    with working(f"reading the config of {spec}"):
        model = load_empty(spec, given, revision=revision, trust_remote_code=trust_remote_code)
        if quantisation_of(model.config):
            count_as_stored(model, stored_sizes(spec, revision, named_weights(spec, model.config)))
        return model


def dummy_model(
    spec: str,
    dummy_weights: bool,
    dtype: str,
    device: str,
    revision: str | None,
    trust_remote_code: bool,
    seed: int,
) -> PreTrainedModel:
    from ..models.loading import build_random, load_config, resolve_device, resolve_dtype

    if not dummy_weights:
        raise UsageError("--shape has no weights of its own: add --dummy-weights")
    place = resolve_device(device)
    config = load_config(spec, revision=revision, trust_remote_code=trust_remote_code)
    return build_random(config, dtype=resolve_dtype(dtype, place), device=place, seed=seed)


def text_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    sequences: int,
    length: int,
    batch_size: int,
    seed: int,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Token batches on the model's device, and what they are, for the record."""
    from ..models.texts import read_text, token_batches
    from ..structure.anatomy import positions_of

    text = read_text(source)
    if length > (most := positions_of(model)):
        raise UsageError(f"windows of {length} tokens exceed the model's {most} positions: lower --length")
    batches = token_batches(tokenizer, text, sequences=sequences, length=length, batch_size=batch_size, seed=seed)
    described = {"text": text.name, "text_sha256": text.sha256, "sequences": sequences, "length": length}
    return [batch.to(model.device) for batch in batches], described


def battery_windows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, seed: int) -> list[Tensor]:
    """The windows of text that `--battery` goes by."""
    from ..evaluation.battery import WINDOW_TOKENS, WINDOWS
    from ..structure.anatomy import positions_of

    length = int(min(WINDOW_TOKENS, positions_of(model)))
    return text_batches(model, tokenizer, source, WINDOWS, length, 1, seed)[0]


def provenance_of(model: PreTrainedModel, spec: str, revision: str | None, **more: Any) -> Provenance:
    """Where figures of this run come from; `more` decides whether a run goes on, as the model does."""
    from ..measuring.speed import machine
    from ..models.loading import dtype_name, identify
    from ..records.provenance import Provenance, this_run

    about = machine(model.device)
    where = {name: about[name] for name in ("device", "threads", "versions")} | {"machine": about} | this_run()
    what = {**identify(spec, revision=revision), "dtype": dtype_name(model), **more}
    return Provenance(what=what, where=where)


def read_plan(path: Path | None) -> Plan:
    """The plan of a file, an export, or the folder of a repair, with its weights; without a path, an empty one."""
    from ..records.plan import Plan

    if path and (path / MANIFEST).is_file():
        from ..exporters.manifest import plan_of

        return plan_of(path)
    if path and path.is_dir():
        from ..running.repaired_folders import load_repaired

        return load_repaired(path)
    return Plan.load(path) if path else Plan()


@dataclass(frozen=True)
class AskedPlan:
    """What is to be left out: a plan that was read, or else the deepest of a kind, known once the model is."""

    read: Plan
    path: Path | None
    skip: SkippedKind | None
    fraction: float
    keep_last: bool

    def of(self, model: PreTrainedModel) -> Plan:
        return deepest_plan(model, self.skip, self.fraction, self.keep_last) if self.skip else self.read

    @property
    def words(self) -> dict[str, object]:
        """The options that say it, for the next command."""
        if self.skip is None:
            return {"plan": self.path}
        return {"skip": self.skip.value, "fraction": self.fraction, **({"keep-last": True} if self.keep_last else {})}


def asked_plan(
    plan: Path | None,
    skip: SkippedKind | None,
    fraction: float | None,
    keep_last: bool,
    *,
    needed: bool = False,
    model: str = "",
) -> AskedPlan:
    """What `--plan`, or `--skip` with its options, leave out of `model`; nothing without either, if not `needed`.

    Raises `UsageError` where they say two things, or too little.
    """
    if plan and skip:
        raise UsageError("--plan and --skip both say what to leave out: give one of them")
    if skip is None and (fraction is not None or keep_last):
        raise UsageError(
            "--fraction and --keep-last say how much of what to leave out: add --skip attention, mlp or block"
        )
    if needed and not (plan or skip) and model and (Path(model) / MANIFEST).is_file():
        from ..exporters.manifest import dense_of, weights_beside

        beside = shortened(weights_beside(Path(model)) or model)
        raise UsageError(
            f"{shortened(model)} is what is left of another model: name that one, such as {dense_of(Path(model))}, "
            f"and give --plan {beside}"
        )
    if needed and not (plan or skip):
        raise UsageError(
            "say what to leave out: --plan plan.json (notall search writes one), or --skip attention --fraction 0.25"
        )
    return AskedPlan(read_plan(plan), plan, skip, 0.33 if fraction is None else fraction, keep_last)


def deepest_plan(model: PreTrainedModel, skip: SkippedKind, fraction: float, keep_last: bool) -> Plan:
    """Raises `UsageError` where a fraction is less than one layer, and as `deepest` does."""
    from ..evaluation.paper.grid import deepest
    from ..structure.locating import locate

    anatomy = locate(model)
    found = deepest(anatomy, skip.value, fraction, keep_last=keep_last)
    if fraction and not found:
        raise UsageError(f"{fraction:g} of {len(anatomy.blocks)} layers is none of them: give a larger --fraction")
    return found


def workers_on(
    address: str | None, count: int | None, gpus: int, model: PreTrainedModel, loading: Loading
) -> AbstractContextManager[Workers | None]:
    """The workers of `--ray`, each with its own copy of the model; None without it."""
    if address is None:
        return nullcontext()
    from ..evaluation.ray_workers import Workers
    from ..structure.locating import locate

    return Workers(asdict(loading), locate(model), address, count=count, gpus=gpus)


def batch_size_of(word: str) -> int | Literal["auto"]:
    """What `--batch-size` says. Raises `UsageError` for anything but a number and auto."""
    if word == "auto":
        return "auto"
    number = whole_number(word)
    if number is None:
        raise UsageError(f"--batch-size {shortened(word)} is neither a number nor auto; give one of them")
    return number


def whole_number(word: str) -> int | None:
    """The number that a word of up to nine digits says; None for any other, such as the digit-like `²`."""
    return int(word) if re.fullmatch("[0-9]{1,9}", word.strip()) else None


def words_of(values: list[str] | None) -> list[str]:
    """The words of an option that may be repeated, or hold several with commas between them."""
    return [word for value in values or () for word in value.split(",") if word]


def space_of(model: PreTrainedModel, kind: str, portable: bool, keep_first: bool, keep_last: bool) -> Space:
    from ..choosing.space import Space
    from ..structure.locating import locate

    return Space(locate(model), kind, portable, int(keep_first), int(keep_last))


def budget_line(model: PreTrainedModel, line: str, keep_first: bool, keep_last: bool) -> tuple[Space, list[int]]:
    """A line such as `attention:4,8` or `portable:8`: what to choose among, and how many."""
    from ..choosing.space import UNIT_KINDS
    from ..structure.locating import locate

    name, _, counts = line.partition(":")
    names = [*UNIT_KINDS, *locate(model).mixers, "portable"]
    numbers = [number for count in counts.split(",") if (number := whole_number(count)) is not None]
    if name not in names or len(numbers) <= counts.count(","):
        raise UsageError(f"{shortened(line)!r} is no budget: write attention:4,8, with one of {', '.join(names)}")
    portable = name == "portable"
    return space_of(model, "sublayer" if portable else name, portable, keep_first, keep_last), numbers


def two_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    held_out: str | None,
    sequences: int,
    length: int,
    batch_size: int,
    seed: int,
    *,
    fewer: bool = False,
) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
    """Batches to calibrate on and as many to measure on, of another text or of other windows of the same.

    With `fewer`, a short text may have fewer other windows, or none.
    """
    from torch import cat

    from ..models.texts import read_text, windows_in

    if held_out:
        batches, described = text_batches(model, tokenizer, text, sequences, length, batch_size, seed)
        others, about = text_batches(model, tokenizer, held_out, sequences, length, batch_size, seed)
        return batches, others, described | {"held_out": about["text"], "held_out_sha256": about["text_sha256"]}
    more = sequences
    if fewer:
        more = max(0, min(sequences, windows_in(tokenizer, read_text(text), length) - sequences))
    both, described = text_batches(model, tokenizer, text, sequences + more, length, batch_size, seed)
    rows = cat(both)
    batches, others = (
        list(part.split(batch_size)) if len(part) else [] for part in (rows[:sequences], rows[sequences:])
    )
    about = {"held_out": "other windows"} if others else {}
    return batches, others, described | about | {"sequences": sequences}


@dataclass(frozen=True)
class AskedBudget:
    """What the options say of a budget: what to save, or at most how many nats to lose, by the names of options."""

    saving: tuple[str, float] | None
    limit: tuple[str, float] | None

    @property
    def aim(self) -> str:
        """The objective that goes with it.

        It is the KL unless NLL is limited: of as much text it tells more, and sets found by it lose less on other text.
        """
        return self.limit[0].removeprefix("max_") if self.limit else "kl"

    def check(self, model: PreTrainedModel, space: Space, workload: Workload) -> None:
        """Raise `UsageError` for what cannot be saved, as far as that is known without timing the model."""
        from ..measuring.speed import check_timing

        if self.saving and self.saving[0] == "speedup":
            check_timing(model, workload.prompt, workload.new, workload.batch)
        else:
            self.of(model, space, workload)

    def of(self, model: PreTrainedModel, space: Space, workload: Workload) -> Budget:
        """The budget; where it is a speedup, the model is timed."""
        from ..choosing.budget import by_limit, within_limit

        limit = by_limit(space, self.limit[1], self.aim.upper()) if self.limit else None
        saving = _saving_of(model, space, *self.saving, workload) if self.saving else None
        if saving and limit:
            return within_limit(saving, limit)
        found = saving or limit
        assert found
        return found


def asked_budget(amounts: dict[str, float | None]) -> AskedBudget:
    """What options of these names give. Raises `UsageError` unless they are one budget, with a limit or without."""
    from ..choosing.budget import check_nats
    from ..choosing.speedups import check_faster

    given = {name: amount for name, amount in amounts.items() if amount is not None}
    limits = [name for name in given if name.startswith("max_")]
    savings = [name for name in given if name not in limits]
    if not given or len(limits) > 1 or len(savings) > 1:
        wrong = savings if len(savings) > 1 else limits or list(amounts)
        names = ["--" + name.replace("_", "-") for name in wrong]
        raise UsageError(f"give one budget: {' or '.join(names)}")
    for name in limits:
        check_nats(given[name])
    if "speedup" in given:
        check_faster(given["speedup"])
    saving, limit = (next(((name, given[name]) for name in names), None) for names in (savings, limits))
    return AskedBudget(saving, limit)


def _saving_of(model: PreTrainedModel, space: Space, name: str, amount: float, workload: Workload) -> Budget:
    from ..choosing.budget import by_count, by_footprint
    from ..choosing.latency import measure_times
    from ..choosing.speedups import by_speedup

    if name == "count":
        return by_count(space, amount)
    if name == "speedup":
        with progress_bar() as progress:
            times = measure_times(model, workload, progress=progress)
        return by_speedup(space, times, amount)
    resources: dict[str, Resource] = {"params": "params", "weights": "weight_bytes", "kv": "kv_bytes_per_token"}
    return by_footprint(model, space, resources[name], amount)
