"""What commands are given, and what they make of it: each dataclass is a group of options of the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from ..errors import UsageError, nearest, need, shortened
from ..exporters import UNPACKED
from ..exporters.manifest import dense_of, plan_of, weights_beside
from ..files import Settings, expanded, named_weights
from ..integrity import MANIFEST
from ..models.names import DEFAULT_MODEL, DEFAULT_TEXT, USE, named_gguf
from ..options import Option, option
from ..plan import PUBLISHED_AS, Plan
from ..results.ledger import as_recorded
from ..results.provenance import Provenance, this_run
from ..results.terminal import progress_bar

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..choosing.space import Space
    from ..evaluation.ray_workers import Workers
    from ..evaluation.tasks import Job, Limits, TaskShelf
    from ..models.texts import Text

Words = tuple[str, ...]  # of an option that may be repeated
TEXT = (
    "a UTF-8 file, a .jsonl with a `text` column, prose, which ships with Python, mix: the model's own answers and "
    "completions, and retrieval; or answers:FILE, its answers to your prompts"
)
QUESTIONS = 100  # of a task that is an objective, where nothing else is said
SKIPPED = 0.33  # of the layers, where nothing else is said: the paper's most


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded: the arguments of `notall.load`."""

    PANEL: ClassVar = "Model"

    model: str = option("smollm2", "smollm2, a hub id, a folder or a .gguf file", (), "MODEL", argument=True)
    dtype: str = option("auto", "dtype to compute in: float32, bfloat16, float16, or auto, which suits the device")
    device: str = option("auto", "device to run on: auto, cpu, cuda, cuda:1, mps ...")
    device_map: str | None = option(None, "spread the model over devices with accelerate: auto, balanced ...")
    attn_implementation: str | None = option(None, "attention implementation: sdpa, eager, flash_attention_2 ...")
    revision: str | None = option(None, "branch, tag or commit of a hub model")
    trust_remote_code: bool = option(False, "run the model's own code from the hub")

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer. Raises as `notall.load` does."""
        from ..models.loading import load

        with progress_bar(f"loading {self.model}"):
            return load(**self.arguments)

    def empty(self) -> PreTrainedModel:
        """The model of a config, without weights, in the dtype that is named, or else as its checkpoint is stored."""
        from ..exporters.tensors import stored_sizes
        from ..models.loading import load_empty, named_dtype
        from ..models.quantisation import quantisation_of
        from ..structure.weights import count_as_stored

        named = self.own_dtype or (UNPACKED if named_gguf(self.model) else None)
        dtype = named_dtype(named) if named else None
        with progress_bar(f"reading the config of {self.model}"):
            model = load_empty(self.model, dtype, revision=self.revision, trust_remote_code=self.trust_remote_code)
            if quantisation_of(model.config):
                weights = named_weights(self.model, model.config)
                count_as_stored(model, stored_sizes(self.model, self.revision, weights))
            return model

    @property
    def own_dtype(self) -> str | None:  # where a model is read and not run; None: the checkpoint's
        return None if self.dtype == "auto" else self.dtype

    @property
    def arguments(self) -> Settings:
        told = asdict(self)
        return {"spec": told.pop("model"), **told}

    @property
    def for_workers(self) -> Settings:
        """The arguments in processes whose working folder is another: a path is absolute."""
        path, is_path = expanded(self.model), self.model != DEFAULT_MODEL
        return self.arguments | ({"spec": str(path.absolute())} if is_path and path.exists() else {})

    def provenance(self, model: PreTrainedModel, **more: object) -> Provenance:
        """Where figures of this run come from; `more` decides whether a run goes on, as the model does."""
        from ..measuring.speed import machine
        from ..models.loading import dtype_name, identify

        about = machine(model.device)
        where = {name: about[name] for name in ("device", "threads", "versions")} | {"machine": about} | this_run()
        what = {**identify(self.model, revision=self.revision), "dtype": dtype_name(model), **more}
        return as_recorded(Provenance(what=what, where=where))


@dataclass(frozen=True)
class PromptOptions:
    PANEL: ClassVar = "Text"

    text: str = option(DEFAULT_TEXT, TEXT)
    sequences: int = option(8, "number of windows")

    def check(self) -> None:
        check_texts(self.text)

    def for_diagnostics(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Tensor]:
        """The windows of the text that the diagnostics read."""
        from ..evaluation.diagnostics import WINDOW_TOKENS, WINDOWS
        from ..structure.model_structure import positions_of

        length = int(min(WINDOW_TOKENS, positions_of(model)))
        return TextOptions(self.text, WINDOWS, length, 1).windows(model, tokenizer, seed=seed)[0]


@dataclass(frozen=True)
class TextOptions(PromptOptions):
    """Windows of a text: how many, of how many tokens, and how many run at a time."""

    length: int = option(256, "tokens in each window")
    batch_size: int = option(4, "windows to run at a time")

    def windows(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0
    ) -> tuple[list[Tensor], Settings]:
        """Token batches on the model's device, and what they are, for the record."""
        from ..models.texts import token_batches
        from ..structure.model_structure import positions_of

        text = _read(model, tokenizer, self.text, self.sequences * self.length)
        size = {"sequences": self.sequences, "length": self.length}
        if self.length > (most := positions_of(model)):
            raise UsageError(f"windows of {self.length} tokens exceed the model's {most} positions: lower --length")
        batches = token_batches(tokenizer, text, **size, batch_size=self.batch_size, seed=seed)
        return [batch.to(model.device) for batch in batches], {"text": text.name, "text_sha256": text.sha256, **size}


@dataclass(frozen=True)
class HeldOutOptions(TextOptions):
    """Windows of a text, and others to measure on: of another text, or of the same."""

    text: str = option(USE, TEXT)
    held_out: str | None = option(None, "text to measure on (default: other windows of --text)")
    held_out_sequences: int | None = option(None, "windows to measure on (default: as --sequences)")

    def check(self) -> None:
        check_texts(self.text, self.held_out)

    def both(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, fewer: bool = False
    ) -> tuple[list[Tensor], list[Tensor], Settings]:
        """Batches to calibrate on, others to measure on, and what they are; with `fewer`, a short text has fewer."""
        from torch import cat

        from ..models.texts import windows_in

        count = self.held_out_sequences or self.sequences
        if self.held_out:
            batches, described = self.windows(model, tokenizer, seed=seed)
            other = replace(self, text=self.held_out, sequences=count)
            others, about = other.windows(model, tokenizer, seed=seed)
            return batches, others, described | {"held_out": about["text"], "held_out_sha256": about["text_sha256"]}
        if fewer:
            text = _read(model, tokenizer, self.text, (self.sequences + count) * self.length)
            count = max(0, min(count, windows_in(tokenizer, text, self.length) - self.sequences))
        both, described = replace(self, sequences=self.sequences + count).windows(model, tokenizer, seed=seed)
        own, rest = cat(both).split([self.sequences, count])
        held_out = {"held_out": "other windows"} if count else {}
        others = list(rest.split(self.batch_size)) if count else []
        return list(own.split(self.batch_size)), others, described | held_out | {"sequences": self.sequences}


def _read(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, tokens: float) -> Text:
    from ..models.mix import text_of

    with progress_bar("reading the text") as progress:
        return text_of(model, tokenizer, source, progress, tokens)


def check_texts(*sources: str | None) -> None:
    """Raise `UsageError` for a text that cannot be read."""
    from ..models.texts import ANSWERS_TO, is_made, read_prompts, read_text

    for source in filter(None, sources):
        if source.startswith(ANSWERS_TO):
            read_prompts(Path(source.removeprefix(ANSWERS_TO)))
        elif not is_made(source):
            read_text(source)


def read_plan(path: Path) -> Plan:
    """The plan of a file, an export, or the folder of a repair, with its weights.

    Raises `UsageError` as their readers do.
    """
    if str(path).startswith(PUBLISHED_AS):  # whatever lies in the working folder
        return Plan.load(path)
    try:
        is_export, is_folder = (path / MANIFEST).is_file(), path.is_dir()
    except OSError as error:  # a name that is too long
        told = f"cannot read the plan {shortened(path)}: {error.strerror}"
        raise UsageError(f"{told}; give another name") from None
    if is_export:
        return plan_of(path)
    if is_folder:
        from ..running.repaired import RepairedPlan

        return RepairedPlan.load(path)
    return Plan.load(path)


KeepFirst = Annotated[bool, Option("preserve the first layer")]
KeepLast = Annotated[bool, Option("preserve the last layer")]
TaskPath = Annotated[Path | None, Option("folder with more tasks: YAML files of the harness, which may run code")]


@dataclass(frozen=True)
class PlanOptions:
    """What is left out: the plan of a file, or the deepest of a kind."""

    plan: Path | None = option(None, "plan file, folder of a repair, or published:NAME")
    skip: str | None = option(None, "instead of --plan: the deepest, such as attention:0.33", (), "KIND[:HOW MANY]")
    keep_last: bool = option(False, "with --skip: preserve the last layer")

    @property
    def amount(self) -> SkipAmount | None:
        return SkipAmount.parse(self.skip, SKIPPED) if self.skip else None

    @cached_property
    def _read(self) -> Plan:
        return read_plan(self.plan) if self.plan else Plan()

    @property
    def words(self) -> dict[str, object]:
        return {"skip": self.amount, "keep_last": self.keep_last or None} if self.skip else {"plan": self.plan}

    def check(self, *, needed: bool = False, model: str = "") -> None:
        """Raise `UsageError` where two things are said, or too little for what is `needed` of `model`."""
        if self.plan and self.skip:
            raise UsageError("--plan and --skip both say what to leave out: give one of them")
        if self.keep_last and not self.skip:
            raise UsageError("--keep-last says which of what is left out: add --skip attention, mlp or block")
        if needed and not (self.plan or self.skip):
            if model and (Path(model) / MANIFEST).is_file():
                beside, dense = shortened(weights_beside(Path(model)) or model), dense_of(Path(model))
                wrong = f"{shortened(model)} is what is left of another model"
                raise UsageError(f"{wrong}: name that one, such as {dense}, and give --plan {beside}")
            raise UsageError("say what to leave out: --plan plan.json (of notall search), or --skip attention:0.25")
        _ = self.amount, self._read

    def of(self, model: PreTrainedModel) -> Plan:
        """The plan that was read, or by the paper's rule the deepest of a kind. Raises as `deepest` does."""
        from ..choosing.criteria.data_free import SKIPPABLE, deepest
        from ..structure.locating import locate

        skip = self.amount
        if skip is None:
            return self._read
        structure, (amount, *more) = locate(model), skip.amounts
        if skip.kind in {"portable", "sublayer", "period", *structure.mixers}.difference(SKIPPABLE):
            raise UsageError(f"--skip {skip} has no deepest: choose a set with `notall search --skip {skip}`")
        if more:
            raise UsageError(f"--skip {skip} asks for several plans: give one number")
        if amount >= 1 and amount % 1:
            raise UsageError(f"--skip {skip} is no number of layers: give a whole one, or a share below 1")
        share, count = (amount, None) if amount < 1 else (None, int(amount))
        found = deepest(structure, skip.kind, share, count=count, keep_last=self.keep_last)  # type: ignore[arg-type]
        if amount and not found:
            raise UsageError(f"{amount:g} of {len(structure.blocks)} layers is none of them: give a larger number")
        return found


@dataclass(frozen=True)
class SkipAmount:
    """A kind of sublayers and how many of them, such as `attention:8`: below 1 a share, several with commas between."""

    kind: str
    amounts: tuple[float, ...]

    @classmethod
    def parse(cls, text: str, *otherwise: float) -> SkipAmount:
        """Raises `UsageError` for what is no number; where none is given, it is `otherwise`."""
        kind, colon, told = text.partition(":")
        numbers = told.split(",") if colon else []
        if not kind or not all(re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?|\.[0-9]{1,9}", word) for word in numbers):
            raise UsageError(f"--skip {shortened(text)} is no kind and number: write attention:8, or attention:0.33")
        return cls(kind, tuple(map(float, numbers)) or otherwise)

    def __str__(self) -> str:
        return f"{self.kind}:{','.join(f'{amount:g}' for amount in self.amounts)}"


def space_of(model: PreTrainedModel, kind: str, keep_first: bool = False, keep_last: bool = False) -> Space:
    """What is chosen among: `portable` is any sublayers whose absence leaves an ordinary checkpoint."""
    from ..choosing.space import UNIT_KINDS, Space
    from ..structure.locating import locate

    structure, portable = locate(model), kind == "portable"
    names = [*UNIT_KINDS, *structure.mixers, "portable"]
    if kind not in names:
        near = nearest(kind, names)
        raise UsageError(f"--skip {shortened(kind)!r}{near} is nothing to choose among: give one of {', '.join(names)}")
    return Space(structure, "sublayer" if portable else kind, portable, int(keep_first), int(keep_last))


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks of lm-evaluation-harness, on how many documents, with how many examples."""

    PANEL: ClassVar = "Benchmarks"

    tasks: Words = option(
        (),
        "passkey, retrieval, answers, written, reasoning, or answers:FILE with your own prompts; openllm, or tasks of "
        "lm-evaluation-harness; separated by commas; see `notall tasks`",
    )
    limit: Words = option(
        (),
        "documents of each task (default: all; 64 of a check, 100 of an objective), such as 40; mmlu=2 limits one "
        "task, or a group's",
    )
    num_fewshot: int | None = option(None, "examples to show (default: the task's own number)", least=0)
    task_path: TaskPath = None
    truncate: bool = option(False, "cut the beginning of what is longer than the context")
    task_batch_size: str = option("auto", "requests to run at a time: a number, or auto")

    def check(self, *, objectives: Sequence[str] = ()) -> TaskChoice:
        """The tasks that there are; the data of `objectives` is read.

        Raises `UsageError` for names and numbers that are none, and where the harness is wanted and not installed.
        """
        word, wanted = self.task_batch_size, words_of(self.tasks)
        if word != "auto" and not re.fullmatch("[0-9]{1,9}", word):
            raise UsageError(f"--task-batch-size {shortened(word)} is neither a number nor auto; give one of them")
        size: int | Literal["auto"] = "auto" if word == "auto" else int(word)
        if not (wanted or objectives):
            return TaskChoice(None, (), self.num_fewshot, size, self.truncate)
        need("lm_eval")
        with progress_bar("reading the harness's tasks"):
            from ..evaluation.tasks import Limits, TaskShelf

            limits = Limits.parse(words_of(self.limit))
            shelf = TaskShelf(self.task_path)
        names = shelf.names(wanted) if wanted else []
        others = shelf.names(objectives) if objectives else []
        limits.check([*names, *others])
        for name in others:
            shelf.build(name, 0, 1)
        return TaskChoice(shelf, tuple(names), self.num_fewshot, size, self.truncate, limits)


@dataclass(frozen=True)
class TaskChoice:
    """Tasks of the harness, by its names; without any there may be no `shelf` to take them from, and no limits."""

    shelf: TaskShelf | None
    names: tuple[str, ...]
    num_fewshot: int | None = None
    batch_size: int | Literal["auto"] = "auto"
    truncate: bool = False
    limits: Limits | None = None
    recovery: float | None = None  # the share of the original model's score that each must keep

    def __bool__(self) -> bool:
        return bool(self.names)

    @property
    def how(self) -> Settings:
        """How requests are run, as `run_tasks` and `PlansLM` take it."""
        return {"batch_size": self.batch_size, "truncate": self.truncate}

    def limit_of(self, task: str) -> int | None:
        return self.limits.of(task) if self.limits else None

    @property
    def questions(self) -> int:
        """How many training questions an objective has of a task."""
        return (self.limits.most if self.limits else None) or QUESTIONS

    def build(self, name: str, choosing: bool = False) -> Job:
        """Its data, loaded, and its requests, built. Raises `UsageError` as `TaskShelf.build` does."""
        assert self.shelf
        return self.shelf.build(name, self.num_fewshot, self.limit_of(name), choosing)

    def jobs(self, choosing: bool = False) -> list[Job]:
        return [self.build(name, choosing) for name in self.names]


HIDDEN = "also measure what accuracy hides: NLL by position, passkey, calibration, writing"
Diagnostics = Annotated[bool, Option(HIDDEN, panel="Benchmarks")]


@dataclass(frozen=True)
class ClusterOptions:
    PANEL: ClassVar = "Cluster"

    ray: str | None = option(
        None,
        "run on a Ray cluster: the running one, or a new one. ADDRESS may be local, auto, HOST:PORT or, except for "
        "heal, ray://HOST:PORT",
        metavar="[ADDRESS]",
    )
    ray_workers: int | None = option(None, "number of workers (default: one for each GPU)")


@dataclass(frozen=True)
class RayOptions(ClusterOptions):
    """With workers that each have a copy of the model."""

    ray_gpus: int = option(1, "GPUs for each worker")

    def workers(self, model: PreTrainedModel, loading: ModelOptions) -> AbstractContextManager[Workers | None]:
        if self.ray is None:
            return nullcontext()
        from ..evaluation.ray_workers import Workers
        from ..structure.locating import locate

        return Workers(loading.for_workers, locate(model), self.ray, count=self.ray_workers, gpus=self.ray_gpus)


def words_of(values: Sequence[str]) -> list[str]:
    """The words of an option that may be repeated, or hold several with commas between them."""
    return [word for value in values for word in value.split(",") if word]
